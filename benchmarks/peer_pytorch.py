#!/usr/bin/env python3
"""Tessera against PyTorch's attention on the CPU: the same tensors, one process, in turn; medians.

    python benchmarks/peer_pytorch.py build/release/benchmarks/tessera_peer_shim.so [--threads 2] [--repeats 5]

Dense causal attention meets scaled_dot_product_attention (with enable_gqa, and with heads expanded beforehand, whose
copies are not counted) and a compiled FlexAttention with a causal block mask made beforehand. A window meets
FlexAttention with the block mask of that window; there the time includes making the mask, as Tessera's includes the
plan. Needs PyTorch (PyPI) and, for FlexAttention, a C++ compiler.
"""

import argparse
import ctypes
import json
import os
import statistics
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # two OpenMP runtimes share the cores: neither may spin

import torch  # noqa: E402
from torch.nn.attention.flex_attention import create_block_mask, flex_attention  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32, "f16": torch.float16}


class Times(ctypes.Structure):
    _fields_ = [("plan_ms", ctypes.c_double), ("kernel_ms", ctypes.c_double), ("density", ctypes.c_double)]


class Tessera:
    def __init__(self, path, threads):
        self.attend = ctypes.CDLL(path).tessera_peer_attend
        self.threads = threads

    def __call__(self, q, k, v, o, dtype, spec):
        batch, q_heads, queries, dim = q.shape
        sizes = (ctypes.c_int64 * 6)(batch, q_heads, k.shape[1], queries, k.shape[2], dim)
        times, message = Times(), ctypes.create_string_buffer(500)
        addresses = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (q, k, v, o)]
        failed = self.attend(*addresses, sizes, dtype.encode(), 1, spec.encode(), self.threads, ctypes.byref(times),
                             message, ctypes.c_size_t(len(message)))  # fmt: skip
        if failed:
            raise RuntimeError(message.value.decode())
        return times


def milliseconds(work):
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def take_turns(works, repeats):
    """Medians of each work, after one warm-up each."""
    samples = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            time.sleep(0.02)  # lets the threads of the other runtime fall asleep
            samples[name].append(milliseconds(work))
    return {name: statistics.median(times) for name, times in samples.items()}


def make_inputs(length, heads, kv_heads, dim, dtype):
    generator = torch.Generator().manual_seed(1)
    shapes = [(1, heads, length, dim), (1, kv_heads, length, dim), (1, kv_heads, length, dim)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def causal(b, h, q, kv):
    return q >= kv


def window_of(size):
    def window(b, h, q, kv):
        return (q >= kv) & (q - kv < size)

    return window


def compare(name, tessera, spec, dtype, peers, inputs, repeats, target):
    """peers: name -> callable on (q, k, v) that returns o. Prints one line per peer and returns the row."""
    q, k, v = inputs
    o = torch.empty_like(q)
    tessera(q, k, v, o, dtype, spec)
    works = {"tessera": lambda: tessera(q, k, v, o, dtype, spec)}
    for peer, attention in peers.items():
        expected = attention(q, k, v)
        difference = ((o.float() - expected.float()).norm() / expected.float().norm()).item()
        if not difference < 2e-2:
            raise RuntimeError(f"{name}: tessera and {peer} disagree: relative difference {difference:.3g}")
        works[peer] = lambda attention=attention: attention(q, k, v)
    medians = take_turns(works, repeats)
    best = min((time, peer) for peer, time in medians.items() if peer != "tessera")
    speed_up = best[0] / medians["tessera"]
    times = "  ".join(f"{peer} {time:.1f} ms" for peer, time in medians.items())
    print(f"{name:<36}{speed_up:>7.2f}x (target {target}x) against {best[1]}: {times}", flush=True)
    return {"case": name, "ms": medians, "best_peer": best[1], "speed_up": speed_up, "target": target}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shim", help="tessera_peer_shim.so of the build")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--len", type=int, default=8192, help="tokens of the dense cases")
    parser.add_argument("--window-len", type=int, default=32768)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--only", default="", help="cases whose name contains this text")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    threads = torch.get_num_threads()
    tessera = Tessera(options.shim, threads)
    flex = torch.compile(flex_attention)
    compiled_mask = torch.compile(create_block_mask)
    print(f"PyTorch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {threads} threads", flush=True)

    rows = []

    def run(name, *arguments):
        if options.only in name:
            rows.append(compare(name, *arguments))

    def sdpa(q, k, v):
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    with torch.no_grad():
        mask = create_block_mask(causal, None, None, options.len, options.len, device="cpu")
        for dtype, target in (("bf16", 2.0), ("f32", 1.3)):
            for dim in (128, 64):
                inputs = make_inputs(options.len, 8, 2, dim, DTYPES[dtype])
                wide = [tensor.repeat_interleave(4, 1) for tensor in inputs[1:]]
                peers = {
                    "sdpa": sdpa,
                    "sdpa-expanded": lambda q, k, v: scaled_dot_product_attention(q, *wide, is_causal=True),
                    "flex": lambda q, k, v: flex(q, k, v, block_mask=mask, enable_gqa=True),
                }
                run(f"dense {dtype} {options.len} dim {dim}", tessera, "dense", dtype, peers, inputs, options.repeats,
                    target)  # fmt: skip

        window = window_of(options.window)

        def make_mask():
            return compiled_mask(window, None, None, options.window_len, options.window_len, device="cpu")

        def flex_window(q, k, v):
            return flex(q, k, v, block_mask=make_mask(), enable_gqa=True)

        for dtype in ("bf16", "f32"):
            inputs = make_inputs(options.window_len, 8, 2, 128, DTYPES[dtype])
            made = make_mask()
            name = f"window {options.window} {dtype} {options.window_len}"
            spec = f"window:left={options.window - 1}"
            run(name, tessera, spec, dtype, {"flex": flex_window}, inputs, options.repeats, 1.5)
            peers = {"flex": lambda q, k, v: flex(q, k, v, block_mask=made, enable_gqa=True)}
            run(f"{name}, mask made before", tessera, spec, dtype, peers, inputs, options.repeats, 1.5)
    if options.json:
        print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
