#!/usr/bin/env python3
"""A row for every method: what it computes or holds, and its time beside dense attention in the same run.

    benchmarks/methods.py build/release/bin/tessera [--threads 2] [--len 8192] [--repeats 3] [--only TEXT]

Selectors run a prefill (or a decoding step) of generated heads through `tessera bench attention`: share of the pairs that
is computed, share of dense attention's time that choosing and running take, error against dense attention. Caches run the embedded model through
`tessera run` on the demo's document: what they hold after the prompt, and how fast they decode beside the dense cache;
the error is what they cost in bits per byte when `tessera eval` has them decode stretches of the document (`--stretch`
tokens, of which the last are decoded) behind a dense prefill.

`duo` and `razor` are dense without a file that classes heads: here `tessera tune razor` writes one for the embedded
model, for both; generated heads have one of two kv heads that streams.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
GRID = "8x32x32"
MODEL = ROOT / "models" / "tessera-bytes"


def selectors(options):
    """Rows: method SPEC, arguments of `bench attention`."""
    shape = ["--heads", "8", "--kv-heads", "2", "--dim", "128", "--dtype", "bf16"]
    text = [*shape, "--len", str(options.len), "--causal", "--data", "heads-llm"]
    video = [*shape, "--len", "8192", "--grid", GRID, "--data", "heads-video"]
    decode = [*shape, "--len", str(4 * options.len), "--phase", "decode", "--data", "heads-llm"]
    gradients = [*shape, "--len", str(options.len), "--causal", "--phase", "backward"]
    rows = [(spec, text) for spec in ("window", "streaming", "tri-shape", "moa", "xattention", "minference")]
    rows += [(spec, text) for spec in ("flexprefill", "proxyattn", "pbs", "anchor-stripe", "sale", "sparge", "seer")]
    rows += [(spec, text) for spec in ("hip", "dhsa", "token-sparse:layers=all", "hyper", "delta-llm", "oracle-topk")]
    rows += [(spec, text) for spec in ("moba", "nsa", "softplus-reweight", "gated")]
    rows += [(spec, text) for spec in ("lightning2", "gated-deltanet", "kda")]
    rows += [(spec, text) for spec in ("duo",)]
    rows += [(spec, video) for spec in ("gna", "psa", "pisa", "paro", "draft", "sla")]
    rows += [(spec, decode) for spec in ("streaming", "quest:dense_layers=0", "oracle-topk:unit=token,k=1024")]
    rows += [(spec, gradients) for spec in ("dense", "moba", "nsa", "softplus-reweight", "gated")]
    rows += [(spec, gradients) for spec in ("lightning2", "gated-deltanet", "kda")]
    return rows


CACHES = ("dense", "tidaldecode:budget=512,select_layer=1", "delta:full_layers=0-1,pages=32", "quest", "snapkv", "h2o",
          "duo", "razor", "moa", "think", "mustafar", "zipcache")  # fmt: skip


def write_method(path, method, parameters):
    path.write_text(json.dumps({"method": method, "parameters": parameters}))
    return str(path)


def generated_heads(folder):
    """Methods by files for `bench attention`: one layer, of whose two kv heads the second streams."""
    return {"duo": write_method(folder / "duo.json", "duo", {"heads": {"retrieval": [[1, 0]]}})}


def heads_of_model(options, folder):
    """The same for the embedded model: heads that look back to earlier occurrences retrieve, the others do not."""
    probe = folder / "razor.json"
    subprocess.run([options.binary, "tune", "razor", "--model", str(MODEL), "--length", "2048", "--threads",
                    str(options.threads), "--out", str(probe)], check=True, stderr=subprocess.DEVNULL,
                   stdout=subprocess.DEVNULL)  # fmt: skip
    heads = json.loads(probe.read_text())["parameters"]["heads"]
    return {"razor": str(probe),
            "duo": write_method(folder / "duo_model.json", "duo", {"heads": heads, "sink": 64, "recent": 256})}  # fmt: skip


def run_json(command):
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if result.returncode != 0:
        lines = result.stderr.decode().splitlines()
        raise RuntimeError(lines[-1] if lines else f"exit {result.returncode}")
    return json.loads(result.stdout)


def errors_of(row):
    """Error against dense attention; recurrences and gradients have none, other weights than softmax no mass."""
    error = row.get("error") or {}
    values = (error.get("rel_l2"), error.get("softmax_mass"))
    return "".join(f"{'' if value is None else f'{value:.3f}':>9}" for value in values)


def bench_selectors(options, folder):
    files = generated_heads(folder)
    print(f"{'method':<34}{'phase':>9}{'density':>9}{'kernel/dense':>14}{'plan/dense':>12}{'tokens/s':>12}"
          f"{'rel L2':>9}{'mass':>9}")  # fmt: skip
    for spec, arguments in selectors(options):
        if options.only not in spec:
            continue
        phase = arguments[arguments.index("--phase") + 1] if "--phase" in arguments else "prefill"
        command = [options.binary, "bench", "attention", "--method", files.get(spec, spec), *arguments, "--repeats",
                   str(options.repeats), "--threads", str(options.threads), "--json"]  # fmt: skip
        try:
            row = run_json(command)
        except RuntimeError as error:
            print(f"{spec:<34}{phase:>9}  {error}", flush=True)
            continue
        tokens = row.get("tokens_per_second", 0)
        print(f"{spec:<34}{phase:>9}{row['density']:>9.3f}{row['ratio_to_dense']:>14.3f}{row['plan_to_dense']:>12.3f}"
              f"{tokens:>12.0f}{errors_of(row)}", flush=True)  # fmt: skip


def bench_caches(options, folder):
    files = heads_of_model(options, folder) if any(options.only in spec for spec in ("duo", "razor")) else {}
    print(f"\n{'cache':<42}{'MB held':>9}{'rows kept':>11}{'tokens/s':>10}{'of dense':>10}{'bits/byte - dense':>19}")
    dense_speed = None
    document = max((ROOT / "examples" / "documents").iterdir(), key=lambda path: path.stat().st_size)
    for spec in CACHES:
        if spec != "dense" and options.only not in spec:
            continue
        method = files.get(spec, spec)
        command = [options.binary, "run", "--model", str(MODEL), "--prompt", str(document), "--decode-method", method,
                   "-n", "128", "--threads", str(options.threads), "--json"]  # fmt: skip
        text = [options.binary, "eval", "--model", str(MODEL), "--tasks", "perplexity", "--text", str(document), "--phase",
                "decode", "--lengths", str(options.stretch), "--samples", "3", "--threads", str(options.threads), "--json",
                "--methods", "dense" if spec == "dense" else f"dense,{method}"]  # fmt: skip
        try:
            row = run_json(command)
            error = run_json(text)["results"][-1]["difference"]["mean"]
        except RuntimeError as problem:
            print(f"{spec:<42}  {problem}", flush=True)
            continue
        dense_speed = dense_speed or row["decode_tokens_per_s"]
        print(f"{spec:<42}{row['cache_mb']:>9.1f}{row['cache_tokens_kept']:>11.0f}{row['decode_tokens_per_s']:>10.1f}"
              f"{row['decode_tokens_per_s'] / dense_speed:>10.2f}{error:>19.4f}", flush=True)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary", help="the tessera program")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--len", type=int, default=8192, help="tokens of the prefill cases; decoding has four times as many")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--stretch", type=int, default=6144, help="tokens of a stretch of text for the caches' error")
    parser.add_argument("--caches", action="store_true", help="the caches only")
    parser.add_argument("--only", default="", help="methods whose SPEC contains this text")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if not options.caches:
            bench_selectors(options, pathlib.Path(folder))
        bench_caches(options, pathlib.Path(folder))


if __name__ == "__main__":
    sys.exit(main())
