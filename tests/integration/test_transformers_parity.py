# SPDX-License-Identifier: Apache-2.0
"""`tessera run` against Hugging Face Transformers on random-initialised Llama checkpoints.

Needs pytest, torch, transformers and safetensors; run as
`pytest tests/integration --tessera build/release/bin/tessera`.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

TOLERANCE = 1e-3
BOS, EOS = 256, 257
BASE = {"vocab_size": 264, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5,
        "bos_token_id": BOS, "eos_token_id": EOS, "tie_word_embeddings": False, "initializer_range": 0.1}
CASES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha-tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "mqa": {"num_key_value_heads": 1},
    "wide-heads": {"head_dim": 32},
    "odd-sizes": {"hidden_size": 60, "num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 77},
    "no-bos": {"bos_token_id": None},
    "bf16": {"storage": torch.bfloat16},
    "f16-tied": {"storage": torch.float16, "tie_word_embeddings": True},
    "sharded": {"shard": "60KB"},
    "far-positions": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "head_dim": 64},
}


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
        torch.manual_seed(seed)
        self.config = transformers.LlamaConfig(**{**BASE, **case}, attn_implementation="eager")
        model = transformers.LlamaForCausalLM(self.config).to(storage)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data.uniform_(0.5, 1.5)
        model.save_pretrained(folder, max_shard_size=shard)
        # Read back instead of widened: to(storage) has also rounded the rotary frequencies.
        self.model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                                   attn_implementation="eager").eval()
        write_tokenizer(folder, self.shift)

    def tokens(self, prompt: bytes) -> list[int]:
        """Ids of a prompt, as the tokenizer that was written gives them."""
        start = [] if self.config.bos_token_id is None else [self.config.bos_token_id]
        return start + [(b + self.shift) % 256 for b in prompt]

    @torch.no_grad()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        """[tokens, vocabulary]."""
        return self.model(torch.tensor([tokens])).logits[0]

    @torch.no_grad()
    def greedy(self, tokens: list[int], count: int) -> tuple[list[int], float]:
        """Greedy continuation and the smallest lead of a winner over its runner-up."""
        lead, result = float("inf"), []
        for _ in range(count):
            best = self.logits(tokens + result)[-1].topk(2)
            lead = min(lead, float(best.values[0] - best.values[1]))
            result.append(int(best.indices[0]))
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


@pytest.fixture(scope="module", params=CASES, ids=str)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """One checkpoint per case."""
    return Checkpoint(tmp_path_factory.mktemp(request.param), CASES[request.param])


@pytest.mark.parametrize(("length", "chunk"), [(1, 0), (2, 1), (15, 4), (64, 0), (129, 32), (700, 0), (700, 100),
                                               (700, 256)])
def test_logits(tessera: Path, checkpoint: Checkpoint, tmp_path: Path, length: int, chunk: int) -> None:
    """Logits of every prompt position agree for any chunk length, and so do the bits per byte."""
    prompt = prompt_of(length)
    tokens = checkpoint.tokens(prompt)
    report, logits = run(tessera, checkpoint, prompt, tmp_path, "-n", "0", "--chunk", str(chunk))
    expected = checkpoint.logits(tokens)
    assert report["prompt_tokens"] == len(tokens)
    assert report["density"] == pytest.approx(1.0)
    assert logits.shape == expected.shape
    assert float((logits - expected).abs().max()) < TOLERANCE
    if len(tokens) > 1:
        nats = torch.nn.functional.cross_entropy(expected[:-1], torch.tensor(tokens[1:]), reduction="sum")
        bits = float(nats) / torch.log(torch.tensor(2.0)).item() / (len(tokens) - 1)
        assert report["bits_per_byte"] == pytest.approx(bits, abs=1e-3)


@pytest.mark.parametrize("length", [3, 200])
def test_greedy_tokens(tessera: Path, checkpoint: Checkpoint, tmp_path: Path, length: int) -> None:
    """Twenty greedy tokens agree."""
    prompt = prompt_of(length)
    expected, lead = checkpoint.greedy(checkpoint.tokens(prompt), 20)
    assert lead > 2e-5, "choose another seed: two tokens are too close for float32"
    report, _ = run(tessera, checkpoint, prompt, tmp_path, "-n", "20")
    assert report["tokens"] == expected


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_narrow_cache_stays_near(tessera: Path, checkpoint: Checkpoint, tmp_path: Path, dtype: str) -> None:
    """A cache of 16-bit numbers changes logits by its rounding only, and does change them."""
    prompt = prompt_of(300)
    _, logits = run(tessera, checkpoint, prompt, tmp_path, "-n", "0", "--kv-dtype", dtype)
    expected = checkpoint.logits(checkpoint.tokens(prompt))
    error = float((logits - expected).norm() / expected.norm())
    assert 1e-7 < error < (0.02 if dtype == "bf16" else 0.003)
