"""Running a model."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import tessera

FOLDER = pathlib.Path(__file__).parents[2] / "models" / "tessera-bytes"
PROMPT = "The pass key is 4821. " + "The grass is green and the sky is blue. " * 20 + "The pass key is"


@pytest.fixture(scope="module")
def model():
    return tessera.Model.load(FOLDER)


def test_tokens_and_text(model):
    tokens = model.encode("ab é")
    assert model.decode(tokens) == "ab é" and model.encode(b"ab", with_bos=False) == model.encode("ab")[-2:]
    assert model.config["layers"] == 4 and "4 layers" in repr(model)


def test_generation_is_greedy_decoding(model):
    result = model.generate(PROMPT, 12, bits_per_byte=True)
    session = model.session()
    logits = session.prefill(model.encode(PROMPT))
    assert logits.shape == (model.config["vocab_size"],) and logits.dtype == np.float32
    tokens = []
    while len(tokens) < 12:
        tokens.append(int(logits.argmax()))
        logits = session.decode(tokens[-1])
    assert tokens == result.tokens
    assert model.decode(tokens) == result.text and 0 < result.bits_per_byte < 8
    assert result.statistics["density"] == 1 and result.statistics["decode_tokens"] == 11
    assert result.text in result._repr_html_() or "&" in result._repr_html_()
    session.reset()
    assert session.tokens == 0


def test_methods_in_a_model(model):
    sparse = model.generate(PROMPT, 4, method="streaming:n_init=16,n_local=64")
    assert sparse.statistics["density"] < 0.5
    evicting = model.generate(PROMPT, 4, method="dense", decode_method="snapkv:capacity=128")
    assert evicting.statistics["cache_tokens_kept"] < len(model.encode(PROMPT))
    plans = model.plans(PROMPT, "streaming:n_init=16,n_local=64")
    assert len(plans) == 4 and all(plan.density < 0.5 for plan in plans)


def test_streams(model):
    whole = model.generate(PROMPT, 20).text
    assert "".join(model.stream(PROMPT, 20)) == whole
    session = model.session()
    first = next(iter(stream := session.stream(PROMPT, 100_000)))
    stream.close()
    assert whole.startswith(first)
    assert session.tokens < 3000


def test_a_stream_raises_where_it_is_read(model):
    with pytest.raises(tessera.Error, match="capacity|exceed"):
        list(model.session(capacity=10).stream(PROMPT, 5))


def test_an_exception_of_a_callback_ends_the_call(model):
    def refuse(text):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        model.session().generate(PROMPT, 5, on_text=refuse)


def test_sampling_is_reproducible(model):
    texts = [model.generate(PROMPT, 20, temperature=1.0, top_p=0.9, seed=seed).text for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_evaluation(model):
    rows = model.evaluate(["passkey"], [256], ["dense", "streaming:n_init=4,n_local=16"], samples=2)
    dense, sparse = rows
    assert dense.samples == 2 and dense.density == 1 and sparse.density < 0.5
    assert 0 <= dense.score.low <= dense.score.mean <= dense.score.high <= 1
    assert sparse.difference is not None and "passkey" in tessera.tasks()
    assert rows._repr_html_().count("<tr>") == 3
    with pytest.raises(tessera.Error, match="did you mean"):
        model.evaluate(["paskey"])


def test_weights_are_mapped_or_copied(model):
    tokens = model.encode("Attention is")
    expected = model.session().prefill(tokens)
    sizes = {}
    for weights in ["mapped", "copied"]:
        other = tessera.Model.load(FOLDER, weights=weights, threads=2)
        np.testing.assert_array_equal(other.session().prefill(tokens), expected)
        sizes[weights] = other._native.weight_bytes
    assert sizes["copied"] >= sizes["mapped"] + os.path.getsize(os.path.join(FOLDER, "model.safetensors"))


def test_mistakes(model, tmp_path):
    with pytest.raises(tessera.Error, match="config.json"):
        tessera.Model.load(tmp_path)
    with pytest.raises(tessera.Error, match="weights is 'huge'; expected auto, mapped or copied"):
        tessera.Model.load(FOLDER, weights="huge")
    with pytest.raises(tessera.Error, match="empty"):
        model.session().prefill([])
    with pytest.raises(tessera.Error, match="vocabulary"):
        model.session().prefill([10**6])
    with pytest.raises(tessera.Error, match="kv_dtype"):
        model.session(kv_dtype="f64")


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_ends_a_generation():
    program = (
        "import sys, signal, threading, os, time, tessera\n"
        "model = tessera.Model.load(sys.argv[1])\n"
        "threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()\n"
        "try:\n"
        "    while True: model.generate('word ' * 400, 400)\n"
        "except KeyboardInterrupt:\n"
        "    print('ended')\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(FOLDER)], capture_output=True, text=True, timeout=120)
    assert done.stdout == "ended\n", done.stderr
