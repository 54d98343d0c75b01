# SPDX-License-Identifier: Apache-2.0
"""Check an exported folder against Hugging Face: logits, greedy decoding and the tokenizer."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaForCausalLM

from model import BOS, EOS, Llama, ModelConfig

TEXTS = ("", "plain", "tabs\tand\r\nCRLF\n\n", "naïve – 数学 🙂 \u0000 end", "  leading and trailing  ")


def load(folder: Path) -> Llama:
    """The exported model in the training code, in float32."""
    shape = json.loads((folder / "config.json").read_text())
    model = Llama(ModelConfig(**{k: shape[k] for k in ModelConfig.__dataclass_fields__}))
    model.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
    return model


def check_tokenizer(folder: Path) -> None:
    """Ids are byte values, with <bos> before them, and decoding gives the text back."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert ids == [BOS, *text.encode()], text
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode(text, add_special_tokens=False).ids == list(text.encode())
    assert tokenizer.encode("a<eos>", add_special_tokens=False).ids == [97, EOS]
    auto = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert auto(text)["input_ids"] == [BOS, *text.encode()], text
        assert auto.decode(auto(text)["input_ids"], skip_special_tokens=True) == text


@torch.no_grad()
def check_logits(folder: Path, length: int = 2048) -> float:
    """The largest difference of the logits between Transformers and the training code, in float32."""
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs.eval()
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, length)))
    tokens[0, 0] = BOS
    return float((theirs(tokens).logits - load(folder)(tokens)).abs().max())


def main() -> None:
    """Check a folder and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?",
                        default=Path(__file__).resolve().parent.parent / "models" / "tessera-bytes")
    folder = parser.parse_args().folder
    check_tokenizer(folder)
    difference = check_logits(folder)
    print(f"tokenizer: ok; largest difference of the logits: {difference:.2e}")
    assert difference < 1e-3


if __name__ == "__main__":
    main()
