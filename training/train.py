# SPDX-License-Identifier: Apache-2.0
"""Train the embedded byte-level model on the text of a Debian system and on generated recall tasks.

`python training/train.py` runs the whole recipe (stages, seeds and sizes below) and exports the result; it resumes
from the last checkpoint in the work folder when it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from corpus import Corpus, TextSampler, load_corpus
from evaluate import bits_per_byte, key_value_accuracy, passkey_accuracy
from export import export
from model import Llama, ModelConfig, rope_tables
from optimizer import MuonAdamW
from tasks import Tasks, skipped_positions


@dataclass(frozen=True)
class Stage:
    """A stretch of training: rows of one length, `mix` of tasks, the learning rate scaled by `lr`
    (from, to), positions skipped in a share of the recall rows."""

    name: str
    length: int
    batch: int
    steps: int
    mix: dict[str, float]
    lr: tuple[float, float] = (1.0, 1.0)
    skip: float = 0.5


STAGES: tuple[Stage, ...] = (
    Stage("recall", 256, 32, 100, {"repeat": 0.25, "kv": 0.30, "passkey": 0.20, "text": 0.25}, (1.00, 0.98)),
    Stage("mixed", 1024, 8, 100, {"text": 0.55, "passkey": 0.15, "kv": 0.15, "repeat": 0.05, "quote": 0.10},
          (0.98, 0.93)),
    Stage("needles", 1024, 8, 75, {"text": 0.30, "passkey": 0.40, "kv": 0.20, "repeat": 0.05, "quote": 0.05},
          (0.65, 0.45)),
    Stage("medium", 4096, 2, 16, {"text": 0.20, "passkey": 0.55, "kv": 0.20, "quote": 0.05}, (0.17, 0.14)),
    Stage("needles-2k", 2048, 4, 50, {"text": 0.15, "passkey": 0.70, "kv": 0.15}, (0.40, 0.08)),
    Stage("again-1k", 1024, 8, 45, {"text": 0.10, "passkey": 0.75, "kv": 0.15}, (0.65, 0.25)),
    Stage("again-4k", 4096, 2, 13, {"passkey": 0.90, "kv": 0.10}, (0.25, 0.12)),
    Stage("marked-4k", 4096, 2, 14, {"passkey": 0.85, "kv": 0.15}, (0.30, 0.10)),
    Stage("marked-8k", 8192, 2, 4, {"passkey": 0.85, "kv": 0.15}, (0.10, 0.03)),
)

MATRIX_LR = 0.02
OTHER_LR = 0.004
WEIGHT_DECAY = 0.02
WARMUP_STEPS = 40
ANSWER_WEIGHT = 1.5
FIRST_WEIGHT = 8.0
CLIP = 1.0


@dataclass(frozen=True)
class Batch:
    """Rows with their positions, and the loss weight of predicting each token after the first."""

    tokens: Tensor
    positions: Tensor
    weight: Tensor
    answer: Tensor


def make_batch(stage: Stage, tasks: Tasks, step: int, seed: int, limit: int) -> Batch:
    """The batch of a step: a function of the seed and the step alone, so that a resumed run sees the same data."""
    rng = np.random.default_rng([seed, step])
    makers = tasks.generators()
    names, shares = list(stage.mix), np.array(list(stage.mix.values()))
    tokens, positions, answers, noises = [], [], [], []
    for _ in range(stage.batch):
        name = names[int(rng.choice(len(names), p=shares / shares.sum()))]
        row = makers[name](rng, stage.length)
        skip = name != "text" and rng.random() < stage.skip
        positions.append(skipped_positions(rng, stage.length, limit) if skip else np.arange(stage.length))
        tokens.append(row.tokens)
        answers.append(row.answer)
        noises.append(row.noise)
    answer = torch.from_numpy(np.stack(answers)[:, 1:])
    plain = torch.from_numpy(~np.stack(noises)[:, 1:]) & ~answer
    # The first token of an answer is the hard one: the place to read from is known by the context alone.
    first = answer & ~F.pad(answer, (1, 0))[:, :-1]
    recall = answer + (FIRST_WEIGHT - 1.0) * first
    weight = plain / plain.sum().clamp(min=64) + ANSWER_WEIGHT * recall / recall.sum().clamp(min=16)
    return Batch(torch.from_numpy(np.stack(tokens)), torch.from_numpy(np.stack(positions)), weight.float(), answer)


def loss_of(model: Llama, tokens: Tensor, cos: Tensor, sin: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted loss and the cross entropy of every token [B, T-1]."""
    logits = model.decode(tokens, cos, sin)[:, :-1]
    nll = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view_as(weight)
    return (nll * weight).sum(), nll.detach()


class Workers:
    """Threads that each take a share of the rows of a batch and meet once per step.

    Each computes with one thread of its own: on a machine that is busy with other work this wastes far less time in
    waiting than threads that meet in every operation.
    """

    def __init__(self, model: Llama, count: int, compiled: bool) -> None:
        self.model, self.count = model, count
        self.parameters = list(model.parameters())
        self.function = torch.compile(loss_of, dynamic=False) if compiled else loss_of
        self.pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
        self.known: set[torch.Size] = set()

    def _share(self, parts: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
        loss, nll = self.function(self.model, *parts)
        return torch.autograd.grad(loss, self.parameters), nll

    def gradients(self, *parts: Tensor) -> Tensor:
        """Put the gradients into the parameters; returns the cross entropy of every token."""
        shares = list(zip(*(part.chunk(self.count) for part in parts), strict=True))
        new = {share[0].shape for share in shares} - self.known
        if new:  # compile in one thread
            results = [self.pool.submit(self._share, share).result() for share in shares]
            self.known |= new
        else:
            results = list(self.pool.map(self._share, shares))
        for i, parameter in enumerate(self.parameters):
            parameter.grad = sum((gradients[i] for gradients, _ in results[1:]), results[0][0][i])
        return torch.cat([nll for _, nll in results])


def lr_scale(stages: tuple[Stage, ...], step: int) -> float:
    """Linear warm-up at the start, and linear from one scale to the other within a stage."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    for stage in stages:
        if step < stage.steps:
            return warm * (stage.lr[0] + (stage.lr[1] - stage.lr[0]) * step / stage.steps)
        step -= stage.steps
    raise IndexError(step)


def stage_at(stages: tuple[Stage, ...], step: int) -> tuple[Stage, bool]:
    """The stage of a step, and whether the step is its last."""
    for stage in stages:
        if step < stage.steps:
            return stage, step == stage.steps - 1
        step -= stage.steps
    raise IndexError(step)


def tokens_before(stages: tuple[Stage, ...], step: int) -> int:
    """The tokens seen before a step."""
    total = 0
    for stage in stages:
        n = min(step, stage.steps)
        total += n * stage.batch * stage.length
        step -= n
    return total


def save(path: Path, model: Llama, optimizer: MuonAdamW, step: int, seconds: float) -> None:
    """Write a checkpoint in one piece."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}
    torch.save(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def train(
    model: Llama,
    corpus: Corpus,
    stages: tuple[Stage, ...],
    work: Path,
    seed: int,
    compiled: bool,
    threads: int = 2,
    evaluate_every: int = 100,
) -> float:
    """Run the stages, from the last checkpoint in `work` on; returns the seconds of training."""
    tasks = Tasks(TextSampler(corpus.train, seed), corpus.words)
    held_out = Tasks(TextSampler(corpus.held_out, seed + 1), corpus.words)
    optimizer = MuonAdamW(model, MATRIX_LR, OTHER_LR, WEIGHT_DECAY)
    workers = Workers(model, threads, compiled)
    start, spent = 0, 0.0
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, spent = state["step"], state["seconds"]
        print(f"resumed at step {start}", flush=True)
    steps = sum(s.steps for s in stages)
    total = tokens_before(stages, steps)
    saved = logged = time.monotonic()
    sums = np.zeros(4)
    for step in range(start, steps):
        began = time.monotonic()
        stage, last = stage_at(stages, step)
        batch = make_batch(stage, tasks, step, seed, model.config.max_position_embeddings)
        cos, sin = rope_tables(batch.positions, model.config.head_dim, model.config.rope_theta)
        nll = workers.gradients(batch.tokens, cos, sin, batch.weight)
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        done = tokens_before(stages, step)
        scale = lr_scale(stages, step)
        optimizer.step(scale, workers.pool)
        plain = (batch.weight > 0) & ~batch.answer
        sums += [float(nll[plain].sum()), int(plain.sum()), float(nll[batch.answer].sum()), int(batch.answer.sum())]
        now = time.monotonic()
        spent += now - began
        if now - logged > 20 or last or stage.length > 8192:
            print(f"step {step + 1}/{steps} {stage.name} text {sums[0] / max(1, sums[1]):.3f} answers "
                  f"{sums[2] / max(1, sums[3]):.3f} lr {scale:.3f} "
                  f"{stage.length * stage.batch / (now - began):.0f} tok/s {spent:.0f}s {done / total:.0%}", flush=True)
            sums[:] = 0
            logged = now
        if (step + 1) % evaluate_every == 0 or last:
            rows = max(4, min(32, 65536 // stage.length))
            print(f"  held-out: {bits_per_byte(model, corpus.held_out, 1024, 24):.3f} bits/byte; at {stage.length}: "
                  f"passkey {passkey_accuracy(model, held_out, stage.length, rows):.2f} of {rows}, key-value "
                  f"{key_value_accuracy(model, held_out, stage.length, max(1, rows // 4))[0]:.2f}", flush=True)
        if now - saved > 60 or last:
            save(checkpoint, model, optimizer, step + 1, spent)
            saved = time.monotonic()
        if last:
            save(work / f"after-{stage.name}.pt", model, optimizer, step + 1, spent)
    return spent


def main() -> None:
    """The command line."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=here / "work", help="checkpoints and the manifest go here")
    parser.add_argument("--out", type=Path, default=here.parent / "models" / "tessera-bytes", help="the export")
    parser.add_argument("--seed", type=int, default=20240229)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-compile", action="store_true", help="run without torch.compile (slower, no C++ compiler)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch._dynamo.config.recompile_limit = 32
    arguments.work.mkdir(parents=True, exist_ok=True)
    corpus = load_corpus()
    manifest = {"sources": corpus.manifest, "fingerprint": corpus.fingerprint,
                "stages": [asdict(s) for s in STAGES], "seed": arguments.seed}
    (arguments.work / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    model = Llama(ModelConfig(), arguments.seed)
    print(f"{sum(p.numel() for p in model.parameters())} parameters; "
          f"{sum(map(len, corpus.train))} bytes to train on, {sum(map(len, corpus.held_out))} held out", flush=True)
    seconds = train(model, corpus, STAGES, arguments.work, arguments.seed, not arguments.no_compile,
                    arguments.threads)
    export(model, arguments.out)
    print(f"trained for {seconds:.0f} s; exported to {arguments.out}")


if __name__ == "__main__":
    main()
