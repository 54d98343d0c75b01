"""The GIL is released, and calls in threads do not disturb each other."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import tessera


def test_other_threads_run_meanwhile(rng):
    """While one thread attends, another counts: it would stand still under the GIL."""
    q = rng.standard_normal((1, 2, 400, 64)).astype(np.float32)
    inside = threading.Event()
    done = threading.Event()
    counted = 0

    def attend():
        inside.set()
        for _ in range(3):
            tessera.attention(q, q, q, threads=1, backend="reference", isa="portable")
        done.set()

    thread = threading.Thread(target=attend)
    thread.start()
    inside.wait()
    while not done.wait(0.001):
        counted += 1
    thread.join()
    assert counted > 20  # once per millisecond of a second of work; 3 under the GIL: between the calls


def test_calls_in_threads(qkv):
    expected = {m: tessera.attention(*qkv, m, causal=True) for m in ("dense", "streaming", "xattention", "moba", "nsa")}

    def call(i):
        method = list(expected)[i % len(expected)]
        return (tessera.attention(*qkv, method, causal=True, threads=1 + i % 2) == expected[method]).all()

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(40)))


def test_calls_that_share_a_state_take_turns(qkv):
    q, k, v = qkv
    method = tessera.Method("tidaldecode")
    state = method.new_state()

    def call(i):
        o = tessera.attention(q[:, :, -1:], k, v, method, causal=True, state=state, layer=i % 4, n_layers=4, threads=1)
        return np.isfinite(o).all()

    for layer in range(4):
        call(layer)
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(24)))


def test_errors_in_threads(qkv):
    q, k, v = qkv

    def call(i):
        with pytest.raises(tessera.Error, match="tau"):
            tessera.attention(q, k, v, "xattention", tau=2 + i)
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(16)))
