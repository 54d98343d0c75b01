# SPDX-License-Identifier: Apache-2.0
"""What the model can do: bits per byte on held-out text, and recall by length, with dense attention."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from corpus import TextSampler, load_corpus
from model import BOS, Llama, ModelConfig
from tasks import Tasks


@torch.no_grad()
def bits_per_byte(model: Llama, documents: list[bytes], length: int, windows: int, seed: int = 1) -> float:
    """Mean bits per byte over random windows, each <bos> and `length` - 1 bytes of one document."""
    rng = np.random.default_rng(seed)
    usable = [d for d in documents if len(d) >= length]
    sizes = np.array([len(d) for d in usable], dtype=np.float64)
    total = 0.0
    for _ in range(windows):
        document = usable[int(rng.choice(len(usable), p=sizes / sizes.sum()))]
        start = int(rng.integers(0, len(document) - length + 2))
        data = np.frombuffer(document, dtype=np.uint8)[start : start + length - 1].astype(np.int64)
        tokens = torch.from_numpy(np.concatenate(([BOS], data)))[None]
        logits = model(tokens)
        total += float(F.cross_entropy(logits[0, :-1], tokens[0, 1:]))
    return total / windows / math.log(2.0)


@torch.no_grad()
def passkey_accuracy(
    model: Llama, tasks: Tasks, length: int, rows: int, seed: int = 1, real: bool | None = True
) -> float:
    """Share of rows in which greedy decoding gives a whole 5-digit key; depths spread evenly over the row."""
    found = 0
    for i in range(rows):
        rng = np.random.default_rng([seed, length, i])
        row = tasks.passkey(rng, length, others=0, depth=(i + 0.5) / rows, real=real, digits=True)
        tokens = torch.from_numpy(row.tokens)[None]
        # Greedy decoding gives the key exactly when every token of it is the argmax after the ones before it.
        guess = model(tokens, last=7)[0, :-1].argmax(-1)
        found += bool((guess[:5] == tokens[0, -6:-1]).all())
    return found / rows


@torch.no_grad()
def key_value_accuracy(
    model: Llama, tasks: Tasks, length: int, rows: int, seed: int = 1, in_hay: bool | None = None
) -> tuple[float, int]:
    """Share of the asked values that are recalled whole, and how many were asked."""
    right = asked = 0
    for i in range(rows):
        row = tasks.key_value(np.random.default_rng([seed, length, i]), length, in_hay)
        tail = min(length - 1, 2100)
        tokens = torch.from_numpy(row.tokens)[None]
        guess = model(tokens, last=tail + 1)[0, :-1].argmax(-1).numpy()
        good = guess == row.tokens[-tail:]
        answer = row.answer[-tail:]
        edges = np.flatnonzero(np.diff(np.concatenate(([False], answer, [False])).astype(np.int8)))
        for begin, end in zip(edges[::2], edges[1::2], strict=True):
            if begin > 0 and end < tail:
                asked += 1
                right += bool(good[begin:end].all())
    return right / max(1, asked), asked


def baselines(train: list[bytes], held_out: list[bytes]) -> tuple[float, float]:
    """Bits per byte of a unigram and a bigram model (add-1/16 smoothing) counted on the training text."""
    uni = np.full(256, 1.0 / 16)
    pairs = np.full((256, 256), 1.0 / 16)
    for document in train:
        data = np.frombuffer(document, dtype=np.uint8).astype(np.int64)
        uni += np.bincount(data, minlength=256)
        pairs += np.bincount(data[:-1] * 256 + data[1:], minlength=65536).reshape(256, 256)
    log_uni = np.log2(uni / uni.sum())
    log_pairs = np.log2(pairs / pairs.sum(1, keepdims=True))
    bits_uni = bits_pairs = count = 0.0
    for document in held_out:
        data = np.frombuffer(document, dtype=np.uint8)
        bits_uni -= log_uni[data[1:]].sum()
        bits_pairs -= log_pairs[data[:-1], data[1:]].sum()
        count += len(data) - 1
    return bits_uni / count, bits_pairs / count


def main() -> None:
    """Measure an exported model and print a table."""
    from safetensors.torch import load_file

    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=here.parent / "models" / "tessera-bytes")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--rows", type=int, default=0, help="rows per length; 0: by length")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    weights = {k: v.float() for k, v in load_file(arguments.model / "model.safetensors").items()}
    shape = json.loads((arguments.model / "config.json").read_text())
    config = ModelConfig(**{k: shape[k] for k in ModelConfig.__dataclass_fields__})
    model = Llama(config)
    model.load_state_dict(weights)
    corpus = load_corpus()
    held_out = Tasks(TextSampler(corpus.held_out, 7), corpus.words)
    unigram, bigram = baselines(corpus.train, corpus.held_out)
    print(f"held-out bits per byte: unigram {unigram:.3f}, bigram {bigram:.3f}", flush=True)
    for length, windows in ((1024, 128), (4096, 32)):
        print(f"  model, windows of {length}: {bits_per_byte(model, corpus.held_out, length, windows):.3f} "
              f"({windows} windows)", flush=True)
    print("| length | passkey in text | passkey in filler | key-value in text |\n|---|---|---|---|")
    for length in arguments.lengths:
        rows = arguments.rows or max(8, min(64, 131072 // length))
        real = passkey_accuracy(model, held_out, length, rows, real=True)
        fill = passkey_accuracy(model, held_out, length, max(4, rows // 2), real=False)
        pairs, asked = key_value_accuracy(model, held_out, length, max(2, rows // 8), in_hay=True)
        print(f"| {length} | {real:.2f} of {rows} | {fill:.2f} of {max(4, rows // 2)} | {pairs:.2f} of {asked} |",
              flush=True)


if __name__ == "__main__":
    main()
