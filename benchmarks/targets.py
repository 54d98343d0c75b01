#!/usr/bin/env python3
"""Runs the cases that have a target through `tessera bench` and prints target, measurement and pass or fail.

    benchmarks/targets.py build/release/bin/tessera [--isa avx2] [--threads 2] [--heads 4] [--repeats 3] [--only TEXT]

Every ratio compares medians of one run in which both sides take turns, and every peak is measured in the run that is
judged by it. Exit status 1 when a target is missed, so that a person or a nightly job sees it; tests never time.
"""

import argparse
import json
import subprocess
import sys


def cases(options):
    """Rows: name, arguments of `bench attention`, key of the result, 'min' or 'max', bound."""
    grouped = ["--heads", "8", "--kv-heads", "2"]
    long = ["--len", "32768", "--causal", "--dim", "128", "--heads", str(options.heads), "--kv-heads",
            str(max(1, options.heads // 4))]  # fmt: skip
    dense = ["--method", "dense", "--len", "8192", "--causal", *grouped]
    over = "ratio_to_density_times_dense"

    def bare(plan, *more):
        return ["--plan", plan, *long, "--dtype", options.dtype, *more]

    rows = [
        ("dense bf16 8k, dim 128", [*dense, "--dtype", "bf16", "--dim", "128"], "fraction_of_peak", "min", 0.85),
        ("dense bf16 8k, dim 64", [*dense, "--dtype", "bf16", "--dim", "64"], "fraction_of_peak", "min", 0.75),
        ("dense f32 8k, dim 128", [*dense, "--dtype", "f32", "--dim", "128"], "fraction_of_peak", "min", 0.80),
        ("dense f32 8k, dim 128, AVX2", [*dense, "--dtype", "f32", "--dim", "128", "--isa", "avx2"],
         "fraction_of_peak", "min", 0.80),
        ("random tiles of 128 at 5 %", bare("random-block:tile=128,density=0.05"), over, "max", 1.1),
        ("random tiles of 128 at 2 %", bare("random-block:tile=128,density=0.02"), over, "max", 1.2),
        ("random tiles of 64 at 5 %", bare("random-block:tile=64,density=0.05"), over, "max", 1.2),
        ("gathered tokens at 5 %", bare("random-token:tile=96,density=0.05"), over, "max", 1.3),
        ("per-query selection, 16 blocks of 64", bare("per-query:blocks=16,block=64"), over, "max", 1.6),
    ]  # fmt: skip
    decode = ["--phase", "decode", "--len", "131072", "--heads", "32", "--kv-heads", "8", "--dtype", "bf16"]
    rows += [
        ("decode, dense, 128k keys", [*decode, "--plan", "dense"], "fraction_of_bandwidth", "min", 0.85),
        ("decode, 2k tokens of 128k", [*decode, "--plan", "random-token:keys=2048"], "ratio_to_dense", "max", 1 / 20),
    ]
    for method in ("xattention:stride=16", "minference"):
        rows.append((f"selection of {method}",
                     ["--method", method, *long, "--dtype", options.dtype, "--data", "heads-llm"],
                     "plan_to_dense", "max", 0.10))  # fmt: skip
    rows.append(("memory of 128k prefill beyond inputs and outputs, MiB",
                 ["--method", "window:left=1023", "--len", "131072", *grouped, "--causal", "--dtype", "bf16"],
                 "extra_mb", "max", 64 * 1.048576))  # fmt: skip
    return rows


def measure(options, arguments):
    command = [options.binary, "bench", "attention", *arguments, "--repeats", str(options.repeats), "--json"]
    if options.isa and "--isa" not in arguments:
        command += ["--isa", options.isa]
    if options.threads:
        command += ["--threads", str(options.threads)]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=None if options.verbose else subprocess.PIPE)
    if result.returncode != 0:
        message = "" if options.verbose else result.stderr.decode().splitlines()[-1]
        raise RuntimeError(f"{' '.join(command)}: {message}")
    return json.loads(result.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary", help="the tessera program")
    parser.add_argument("--isa", help="instruction set (default: the best of the machine)")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--heads", type=int, default=4, help="query heads of the 32k cases, four to a kv head")
    parser.add_argument("--dtype", default="bf16", help="dtype of the 32k cases")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="cases whose name contains this text")
    parser.add_argument("--verbose", action="store_true", help="show the progress of every case")
    options = parser.parse_args()

    print(f"{'case':<56}{'target':>12}{'measured':>12}   {'GFLOP/s':>9}{'peak':>9}{'kernel ms':>12}{'dense ms':>12}")
    missed = 0
    for name, arguments, key, sense, bound in cases(options):
        if options.only not in name:
            continue
        try:
            result = measure(options, arguments)
        except RuntimeError as error:
            print(f"{name:<56}{error}")
            missed += 1
            continue
        value = result[key]
        passed = value >= bound if sense == "min" else value <= bound
        missed += not passed
        print(
            f"{name:<56}{'>=' if sense == 'min' else '<='}{bound:>10.3f}{value:>12.3f}{'   ' if passed else ' ! '}"
            f"{result['gflops']:>9.1f}{result['peak_gflops']:>9.1f}{result['kernel_ms']['median']:>12.2f}"
            f"{result['dense_ms']['median']:>12.2f}   {result['isa']}, {result['threads']} threads",
            flush=True,
        )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
