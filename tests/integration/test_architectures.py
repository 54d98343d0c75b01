# SPDX-License-Identifier: Apache-2.0
"""Every supported architecture and rotary scaling against Hugging Face Transformers, random-initialised, in float32."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from checkpoints import Checkpoint, prompt_of, run

torch = pytest.importorskip("torch")

TOLERANCE = 1e-3
LONGEST = "1024"  # some models below are made for less, and must go beyond


def scaled(kind: str, **parameters: Any) -> dict[str, Any]:
    """Rotary parameters."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


LONG = {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [1.5 + 0.7 * i for i in range(8)]}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16}
CASES: dict[str, dict[str, Any]] = {
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "llama-linear": scaled("linear", factor=3.0),
    "llama-dynamic": {"max_position_embeddings": 200, **scaled("dynamic", factor=2.5)},
    "llama-yarn": scaled("yarn", factor=8.0, original_max_position_embeddings=100),
    "llama-yarn-mscale": scaled("yarn", factor=8.0, original_max_position_embeddings=100, mscale=0.7,
                                mscale_all_dim=0.4, beta_fast=16.0, beta_slow=2.0, truncate=False),
    "llama3": scaled("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                     original_max_position_embeddings=128),
    "mistral": {"family": "Mistral", "sliding_window": 100},
    "mistral-no-window": {"family": "Mistral", "sliding_window": None, "head_dim": 32},
    "mixtral": {"family": "Mixtral", "num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen2": {"family": "Qwen2"},
    "qwen2-windows": {"family": "Qwen2", "use_sliding_window": True, "sliding_window": 70, "max_window_layers": 1},
    "qwen3": {"family": "Qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "qwen3-moe": {"family": "Qwen3Moe", **EXPERTS, "norm_topk_prob": True},
    "qwen3-moe-mixed": {"family": "Qwen3Moe", **EXPERTS, "norm_topk_prob": False, "decoder_sparse_step": 2},
    "gemma": {"family": "Gemma", "head_dim": 32, "tie_word_embeddings": True},
    "gemma2": {"family": "Gemma2", "head_dim": 24, "tie_word_embeddings": True, "sliding_window": 40,
               "query_pre_attn_scalar": 50, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0},
    "gemma3": {"family": "Gemma3", "head_dim": 24, "tie_word_embeddings": True, "sliding_window": 40,
               "query_pre_attn_scalar": 50, "num_hidden_layers": 4,
               "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]},
    "gemma3-scaled": {"family": "Gemma3", "head_dim": 24, "tie_word_embeddings": True, "sliding_window": 64,
                      "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                      "rope_parameters": {
                          "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                          "sliding_attention": {"rope_type": "default", "rope_theta": 5e3}}},
    "gemma3-with-vision": {"family": "Gemma3Vision", "head_dim": 24, "tie_word_embeddings": True, "sliding_window": 64,
                           "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "phi3": {"family": "Phi3", "sliding_window": 90, "pad_token_id": 0},
    "phi3-longrope": {"family": "Phi3", "pad_token_id": 0, "original_max_position_embeddings": 210,
                      **scaled("longrope", **LONG)},
    "phi3-partial": {"family": "Phi3", "pad_token_id": 0, "hidden_size": 128, "original_max_position_embeddings": 210,
                     **scaled("longrope", **LONG, partial_rotary_factor=0.5)},
    "smollm3": {"family": "SmolLM3", "num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0], "pad_token_id": 0},
    "smollm3-windows": {"family": "SmolLM3", "no_rope_layers": [1, 0, 1], "use_sliding_window": True,
                        "sliding_window": 45, "pad_token_id": 0},
}


@pytest.fixture(scope="module", params=CASES, ids=str)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """One checkpoint per case."""
    return Checkpoint(tmp_path_factory.mktemp(request.param), CASES[request.param])


@pytest.mark.parametrize(("length", "chunks"), [(1, [0]), (33, [7]), (230, [64]), (700, [0, 150])])
def test_logits(tessera: Path, checkpoint: Checkpoint, tmp_path: Path, length: int, chunks: list[int]) -> None:
    """Logits of every prompt position agree for any chunk length."""
    prompt = prompt_of(length)
    expected = checkpoint.logits(checkpoint.tokens(prompt))
    for chunk in chunks:
        report, logits = run(tessera, checkpoint, prompt, tmp_path, "-n", "0", "--chunk", str(chunk), "--max-length",
                             LONGEST)
        assert report["density"] == pytest.approx(1.0)
        assert float((logits - expected).abs().max()) < TOLERANCE


def test_greedy_tokens(tessera: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Twenty greedy tokens over a cache agree, on both sides of 210 tokens."""
    prompt = prompt_of(200)
    expected, lead = checkpoint.greedy(checkpoint.tokens(prompt), 20)
    assert lead > 2e-5, "choose another seed: two tokens are too close for float32"
    report, _ = run(tessera, checkpoint, prompt, tmp_path, "-n", "20", "--max-length", LONGEST)
    assert report["tokens"] == expected


@pytest.mark.parametrize("method", ["tri-shape:n_init=4,n_local=24,n_last=0", "xattention:tau=0.5,stride=4,block=16"])
def test_methods_run_everywhere(tessera: Path, checkpoint: Checkpoint, tmp_path: Path, method: str) -> None:
    """Sparse methods run the prompt of every architecture, and read less."""
    report, logits = run(tessera, checkpoint, prompt_of(700), tmp_path, "-n", "2", "--method", method, "--max-length",
                         LONGEST)
    assert 0 < report["density"] < 1
    assert bool(logits.isfinite().all())


def test_unknown_architecture(tessera: Path, tmp_path: Path) -> None:
    """The message names it and lists those there are."""
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    (tmp_path / "prompt").write_text("x")
    done = subprocess.run([tessera, "run", "--model", tmp_path, "--prompt", tmp_path / "prompt"], capture_output=True,
                          text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "'mamba' is not supported; supported: llama (LlamaForCausalLM), mistral" in done.stderr
