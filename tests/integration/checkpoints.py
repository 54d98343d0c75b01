# SPDX-License-Identifier: Apache-2.0
"""Random-initialised checkpoints on disk and in memory, and runs of `tessera` on them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

BOS, EOS = 256, 257
BASE = {"vocab_size": 264, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5,
        "bos_token_id": BOS, "eos_token_id": EOS, "tie_word_embeddings": False, "initializer_range": 0.1}


def byte_vocabulary(shift: int) -> dict[str, int]:
    """GPT-2's byte characters; ids are rotated so that they are not byte values."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    characters = [chr(b) if b in printable else chr(next(spare)) for b in range(256)]
    return {c: (b + shift) % 256 for b, c in enumerate(characters)}


def write_tokenizer(folder: Path, shift: int) -> None:
    """A byte-level tokenizer.json without merges."""
    special = [{"id": i, "content": c, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                "special": True} for i, c in ((BOS, "<bos>"), (EOS, "<eos>"))]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    model = {"type": "BPE", "vocab": byte_vocabulary(shift) | {"<bos>": BOS, "<eos>": EOS}, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
        "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level, "model": model}), encoding="utf-8")


class Checkpoint:
    """A random model on disk and in memory (computing in float32)."""

    def __init__(self, folder: Path, case: dict[str, Any], seed: int = 1) -> None:
        case = dict(case)
        storage = case.pop("storage", torch.float32)
        shard = case.pop("shard", "10GB")
        self.folder = folder
        self.shift = seed % 7
        family = case.pop("family", "Llama")
        torch.manual_seed(seed)
        if family == "Gemma3Vision":
            model_class = transformers.Gemma3ForConditionalGeneration
            text = transformers.Gemma3TextConfig(**{**BASE, **case})
            vision = transformers.SiglipVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                                     num_attention_heads=2, image_size=28, patch_size=14)
            self.config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4,
                                                    bos_token_id=BOS, eos_token_id=EOS, image_token_index=263,
                                                    boi_token_index=261, eoi_token_index=262,
                                                    attn_implementation="eager")
        else:
            config_class = getattr(transformers, family.replace("Gemma3", "Gemma3Text") + "Config")
            model_class = getattr(transformers, family + "ForCausalLM")
            self.config = config_class(**{**BASE, **case}, attn_implementation="eager")
        model = model_class(self.config).to(storage)
        for name, parameter in model.named_parameters():
            if "norm" in name:  # Gemma multiplies by 1 + weight
                low = -0.5 if "Gemma" in family else 0.5
                parameter.data.uniform_(low, low + 1)
            elif name.endswith(".bias"):
                parameter.data.uniform_(-0.5, 0.5)
        model.save_pretrained(folder, max_shard_size=shard)
        # Read back instead of widened: to(storage) has also rounded the rotary frequencies.
        self.model = model_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        write_tokenizer(folder, self.shift)

    def tokens(self, prompt: bytes) -> list[int]:
        """Ids of a prompt, as the tokenizer that was written gives them."""
        start = [] if self.config.bos_token_id is None else [self.config.bos_token_id]
        return start + [(b + self.shift) % 256 for b in prompt]

    def forget_lengths(self) -> None:
        """Dynamic rotary scaling remembers the longest sequence so far; a short one makes it start again."""
        self.model(torch.tensor([[0]]))

    @torch.no_grad()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        """[tokens, vocabulary]."""
        self.forget_lengths()
        return self.model(torch.tensor([tokens])).logits[0]

    @torch.no_grad()
    def greedy(self, tokens: list[int], count: int) -> tuple[list[int], float]:
        """Greedy continuation over a cache and the smallest lead of a winner over its runner-up."""
        self.forget_lengths()
        lead, result, cache, step = float("inf"), [], None, tokens
        for _ in range(count):
            output = self.model(torch.tensor([step]), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            best = output.logits[0, -1].topk(2)
            lead = min(lead, float(best.values[0] - best.values[1]))
            step = [int(best.indices[0])]
            result += step
        return result, lead


def prompt_of(length: int) -> bytes:
    """Bytes of every value."""
    generator = torch.Generator().manual_seed(length)
    return bytes(torch.randint(0, 256, (length,), generator=generator).tolist())


def run(tessera: Path, checkpoint: Checkpoint, prompt: bytes, folder: Path, *options: str
        ) -> tuple[dict[str, Any], torch.Tensor]:
    """The JSON report and the prompt's logits."""
    (folder / "prompt").write_bytes(prompt)
    command = [tessera, "run", "--model", checkpoint.folder, "--prompt", folder / "prompt", "--json", "--ignore-eos",
               "--logits-out", folder / "logits.safetensors", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), safetensors_torch.load_file(folder / "logits.safetensors")["logits"]
