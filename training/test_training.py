# SPDX-License-Identifier: Apache-2.0
"""Fast tests of the training code: python -m pytest training"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from check_export import check_logits, check_tokenizer, load  # noqa: E402
from corpus import Corpus, TextSampler  # noqa: E402
from export import byte_characters, export  # noqa: E402
from model import BOS, Llama, ModelConfig  # noqa: E402
from optimizer import orthogonalised  # noqa: E402
from tasks import Tasks, skipped_positions  # noqa: E402
from train import STAGES, Stage, make_batch, stage_at, tokens_before, train  # noqa: E402

WORDS = [b"apple", b"river", b"stone", b"cloud", b"paper"]
TEXT = b"".join(b"Line %d of a text that says that %d is its number.\n" % (i, i * i) for i in range(2000))
SMALL = ModelConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=1, head_dim=32)


@pytest.fixture(scope="module")
def tasks() -> Tasks:
    return Tasks(TextSampler([TEXT, TEXT[::-1]], 0), WORDS)


@pytest.mark.parametrize("name", ["text", "repeat", "quote", "kv", "passkey"])
@pytest.mark.parametrize("length", [128, 256, 1024, 4096])
def test_generators_are_deterministic_and_well_formed(tasks: Tasks, name: str, length: int) -> None:
    make = tasks.generators()[name]
    for seed in range(8):
        row, again = make(np.random.default_rng(seed), length), make(np.random.default_rng(seed), length)
        assert (row.tokens == again.tokens).all() and (row.answer == again.answer).all()
        assert row.tokens.shape == row.answer.shape == row.noise.shape == (length,)
        assert row.tokens[0] == BOS and row.tokens.min() >= 0 and row.tokens.max() < SMALL.vocab_size
        assert not (row.answer & row.noise).any()
        assert row.answer.any() == (name != "text")


def test_passkey_is_planted_once_and_asked_for_at_the_end(tasks: Tasks) -> None:
    for seed, depth in enumerate((0.0, 0.3, 0.5, 1.0)):
        row = tasks.passkey(np.random.default_rng(seed), 2048, others=0, depth=depth, digits=True)
        text = bytes(row.tokens[1:].astype(np.uint8))
        key = text[-6:-1]
        assert key.isdigit() and text.endswith(b"\nWhat is the pass key? The pass key is PK#" + key + b".")
        needle = b"\nThe pass key is PK#" + key + b". Remember it. PK#" + key + b" is the pass key.\n"
        assert text.count(needle) == 1
        assert abs(text.index(needle) / 2048 - depth) < 0.08


def test_key_value_answers_are_the_values_given_before(tasks: Tasks) -> None:
    row = tasks.key_value(np.random.default_rng(3), 512, in_hay=False)
    lines = bytes(row.tokens[1:].astype(np.uint8)).decode().split("\n")
    blank = lines.index("")
    assert len(set(lines[:blank])) == blank > 4
    assert all(line in lines[:blank] for line in lines[blank + 1 : -1])


def test_skipped_positions_rise_and_stay_below_the_limit() -> None:
    for seed in range(50):
        positions = skipped_positions(np.random.default_rng(seed), 256, 32768)
        assert positions[0] == 0 and (np.diff(positions) >= 1).all() and positions[-1] < 32768
    assert (skipped_positions(np.random.default_rng(0), 64, 64) == np.arange(64)).all()


def test_stages_are_walked_through_in_order() -> None:
    total = sum(s.steps for s in STAGES)
    assert stage_at(STAGES, 0) == (STAGES[0], False) and stage_at(STAGES, total - 1) == (STAGES[-1], True)
    assert tokens_before(STAGES, total) == sum(s.steps * s.batch * s.length for s in STAGES)
    with pytest.raises(IndexError):
        stage_at(STAGES, total)


def test_batches_depend_on_seed_and_step_alone(tasks: Tasks) -> None:
    a, b, c = (make_batch(STAGES[0], tasks, step, 1, 32768) for step in (5, 5, 6))
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.weight, b.weight) and torch.equal(a.positions, b.positions)
    assert not torch.equal(a.tokens, c.tokens)


def test_orthogonalised_has_singular_values_near_one() -> None:
    g = torch.randn(2, 48, 96, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalised(g))
    assert values.min() > 0.3 and values.max() < 1.4


def test_model_is_causal_and_relative() -> None:
    model = Llama(SMALL, seed=1)
    tokens = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 30] = (changed[0, 30] + 1) % 256
    with torch.no_grad():
        a, b = model(tokens), model(changed)
        shifted = model(tokens, torch.arange(1000, 1040)[None])
    assert torch.equal(a[:, :30], b[:, :30]) and not torch.equal(a[:, 30:], b[:, 30:])
    assert torch.allclose(a, shifted, atol=1e-4)


def test_training_lowers_the_loss_resumes_and_exports(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    corpus = Corpus([TEXT], [TEXT[:5000]], {}, "", WORDS)
    stages = (Stage("short", 128, 8, 30, {"text": 0.7, "kv": 0.3}),)
    model = Llama(SMALL, seed=1)
    held_out = torch.tensor([[BOS, *TEXT[:500]]])

    def loss() -> float:
        with torch.no_grad():
            return float(torch.nn.functional.cross_entropy(model(held_out)[0, :-1], held_out[0, 1:]))

    before = loss()
    train(model, corpus, stages, tmp_path, 3, compiled=False, evaluate_every=1000)
    after = loss()
    assert after < before - 1.0
    again = Llama(SMALL, seed=2)
    train(again, corpus, stages, tmp_path, 3, compiled=False)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
    export(model, tmp_path / "model")
    assert len(set(byte_characters())) == 256
    check_tokenizer(tmp_path / "model")
    assert check_logits(tmp_path / "model", 96) < 1e-3
    loaded = load(tmp_path / "model")
    with torch.no_grad():
        assert (loaded(held_out) - model(held_out)).abs().max() < 0.2
