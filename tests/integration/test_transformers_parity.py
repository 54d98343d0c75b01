# SPDX-License-Identifier: Apache-2.0
"""`tessera run` against Hugging Face Transformers on random-initialised Llama checkpoints.

Needs pytest, torch, transformers and safetensors; run as
`pytest tests/integration --tessera build/release/bin/tessera`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoints import Checkpoint, prompt_of, run

torch = pytest.importorskip("torch")

TOLERANCE = 1e-3
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
    report, logits = run(tessera, checkpoint, prompt, tmp_path, "-n", "0", "--exact-products", "--chunk",
                         str(chunk))
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
    report, _ = run(tessera, checkpoint, prompt, tmp_path, "-n", "20", "--exact-products")
    assert report["tokens"] == expected


def test_rounded_products_stay_near(tessera: Path, tmp_path: Path) -> None:
    """Products of bf16 weights may round activations to bf16, and no more than that."""
    checkpoint = Checkpoint(tmp_path, CASES["bf16"])
    prompt = prompt_of(300)
    _, logits = run(tessera, checkpoint, prompt, tmp_path, "-n", "0")
    expected = checkpoint.logits(checkpoint.tokens(prompt))
    assert float((logits - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("dtype", ["bf16", "f16", "i8"])
def test_narrow_cache_stays_near(tessera: Path, checkpoint: Checkpoint, tmp_path: Path, dtype: str) -> None:
    """A cache of narrow numbers changes logits by its rounding only, and does change them."""
    prompt = prompt_of(300)
    _, logits = run(tessera, checkpoint, prompt, tmp_path, "-n", "0", "--exact-products", "--kv-dtype", dtype,
                    "--chunk", "100")
    expected = checkpoint.logits(checkpoint.tokens(prompt))
    error = float((logits - expected).norm() / expected.norm())
    assert 1e-7 < error < {"bf16": 0.02, "f16": 0.003, "i8": 0.03}[dtype]
