#!/usr/bin/env python3
"""The table of the prefill methods: what each keeps, loses and costs, on generated heads and on those of a model.

    benchmarks/prefill_table.py build/release/bin/tessera [--lengths 8192:8,32768:2] [--long 131072:1] [--out FILE]

`tessera compare` runs every method at its published defaults on the archetypes of docs/data.md, on what the embedded
model attends to when it reads the documentation, and at the length of --long each on the archetype that it was designed
for. A length is followed by its number of query heads: at four times the tokens a head costs sixteen times as much. Rows
are kept in --state, so that an interrupted run goes on; --out gets them as Markdown beside what the papers claim.
"""

import argparse
import dataclasses
import json
import pathlib
import shlex
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "tessera-bytes"
ARCHETYPES = ("sink-band", "power-law", "vertical-slash", "blocks", "retrieval")


@dataclasses.dataclass
class Method:
    """A row: SPEC, the archetype that the method was designed for, the claim of its paper, and why ours differs."""

    spec: str
    home: str
    claim: str
    why: str
    at: str | None = None  # tokens:query heads of that comparison instead of --long; empty: it has none

    @property
    def name(self):
        return self.spec.partition(":")[0]


METHODS = (
    Method("minference", "vertical-slash", "up to 10x faster prefill at 1M tokens on an A100",
           "1,000 columns and 6,096 distances, rounded up to 64 keys each, are 28% of 128k keys, 4% of 1M"),
    Method("flexprefill", "sink-band", "better accuracy at equal speed than MInference",
           "no factor is claimed; gamma decides, and the long tail of these heads costs it many lines"),
    Method("flexprefill:count=tiles", "vertical-slash", "the same, by the paper's text",
           "columns that stand alone take a tile of 128 keys each"),
    Method("xattention", "blocks", "up to 13.5x attention at 256k on an A100",
           "scores multiply 1/stride of what half of dense attention does, in float32, at half the rate of bf16"),
    Method("sale", "sink-band", "at least 3.36x beyond 64k; estimates take about 11% of dense",
           "no CPU multiplies 4-bit numbers faster than bytes: estimates take 30% of dense here, 25% at least"),
    Method("anchor-stripe", "power-law", "1.44x over the previous best at 128k, up to 4.6x over dense",
           "a third of the keys lies within theta = 12 of the largest logit that the anchor region knows"),
    Method("proxyattn", "power-law", "up to 10.3x attention, 2.4x prefill",
           "one proxy stands for 16 heads here, for 32 in the paper", at="32768:16"),
    Method("pbs", "vertical", "up to 2.75x end to end",
           "columns that stand alone: sorted inside segments of 256, so that half of the tiles go at best"),
    Method("dhsa", "blocks", "20 to 60% less prefill latency at 8k",
           "2,048 keys per tile at any length: a quarter of 8k keys, 2% of 128k"),
    Method("hip:dense_layers=none", "power-law", "large prefill latency cuts, O(T log T)",
           "the first 3 mask_k (log2(T / mask_k / 2) + 1) queries run dense; 512 scattered keys are gathered"),
    Method("token-sparse:layers=all", "vertical", "up to 3.23x attention at 128k",
           "it drops half a percent of the mass, which these heads spread over many tokens"),
    Method("delta-llm", "power-law", "60% of the score multiplications left out, no time claimed",
           "multiplications that are left out one by one do not pay on vector units", at="32768:2"),
    Method("seer", "blocks", "5.67x over FlashAttention-2 at 90% sparsity, 32k",
           "the gate here is not trained: all its probabilities pass the threshold", at="32768:2"),
    Method("hyper", "blocks-scattered", "5x on a single causal layer at 131k",
           "block and sample sizes are the paper's; error follows from sampling, not from a choice"),
    Method("sparge", "blocks", "2.5x to 5x",
           "at theta 0.6 no tile of these heads is alike enough to be predicted; `tune sparge` finds theta per head", at="32768:2"),
    Method("sparge:theta=-0.1,rule=topk", "blocks", "the same, in the authors' simple mode",
           "it keeps half of all key tiles per row, the causal half of which is three quarters"),
    Method("tri-shape", "sink-band", "the cost of an A-shape, first turn kept", "4,096 keys per row at any length"),
    Method("oracle-topk:rule=topp,p=0.95", "blocks", "no method: the best tiles by exact mass", "", at=""),
)

MISSES = """## Where a method holds less than its budget promises

Each method keeps 95% of the mass, or what its paper asks for instead, on the heads that it was designed for
(`tests/tune/prefill_default_mass_test.cpp`). On others:

- `flexprefill` counts lines and divides by the tile, as its authors' code does: columns and distances that stand alone need
  a tile each and get a fraction of one (`vertical-slash`, `retrieval`, the model). `count=tiles` holds gamma = 0.9 of
  the rows that it probes, 0.84 to 0.98 of all rows there.
  `blocks` heads look at other tiles in every row; their pooled estimate is not within tau of the truth, so that they do not
  count as query aware and are judged by the last rows alone (tau=1: 0.97 at 4,096 tokens).
- `xattention` divides the logit of a single hot key by its stride: columns of `vertical-slash` are hardly seen.
- `proxyattn` ranks tiles by the mean of the heads. The heads of `blocks` and `retrieval` look for tokens of their own in a
  fifth of the cases, with strengths of their own; on heads that agree it holds gamma.
- `dhsa` gives every tile 2,048 keys, here a quarter; `hip` and `tri-shape` trust locality, which `retrieval` has none of.
- `token-sparse` leaves queries without output; they count as mass 0. The last 128 rows keep 99.5%.
- At 131,072 tokens about 16% of the mass of `sink-band` lies in the logit noise that every key has (variance 1); neither
  `sale` nor `tri-shape` nor `flexprefill` finds it. At 8,192 tokens it is below 1%.
- `sparge` at theta = 0.6 finds no tile alike enough to be predicted and stays dense; `seer` has an untrained gate here."""


def run_json(command):
    """What a command prints."""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if result.returncode != 0:
        lines = result.stderr.decode().splitlines()
        raise RuntimeError(lines[-1] if lines else f"exit {result.returncode}")
    return json.loads(result.stdout)


def home_of(options, method):
    """Label of the comparison with the method's paper; none where there is none."""
    at = options.long if method.at is None else method.at
    return f"home {method.home} {at.partition(':')[0]}" if options.long and at else None


def missing(state, label, methods):
    """Those whose row is not in the state yet."""
    return [method for method in methods if f"{label} | {method.spec}" not in state]


def cases(options, state, folder):
    """(label, methods, arguments of compare)."""
    shape = ["--kv-heads", "1", "--dim", "128", "--dtype", "bf16"]
    for pair in filter(None, options.lengths.split(",")):
        length, _, heads = pair.partition(":")
        for archetype in ARCHETYPES:
            yield (f"{archetype} {length}", METHODS,
                   [*shape, "--heads", heads or "1", "--lengths", length, "--data", archetype])
    for tokens in filter(None, options.model_tokens.split(",")):
        label, methods = f"model {tokens}", tuple(m for m in METHODS if m.name != "seer")
        if not missing(state, label, methods):
            continue
        qkv = folder / "layers.safetensors"
        prompt = folder / "prompt.txt"
        text = b"".join(file.read_bytes() for file in sorted((ROOT / "docs").glob("*.md")))
        prompt.write_bytes(text[:int(tokens)])
        run_json([options.binary, "run", "--model", MODEL, "--prompt", prompt, "-n", "1", "--json", "--dump-qkv", qkv,
                  "--dump-layers", options.model_layers, "--max-length", str(int(tokens) + 2)])
        yield label, methods, ["--qkv", qkv, "--causal"]
    homes = {}
    for method in METHODS:
        if home_of(options, method) is not None:
            homes.setdefault((home_of(options, method), method.home, method.at or options.long), []).append(method)
    for (label, archetype, at), methods in homes.items():
        length, _, heads = at.partition(":")
        yield label, methods, [*shape, "--heads", heads or "1", "--lengths", length, "--data", archetype]


def measure(options):
    """Rows of all cases, one run per (case, method), read from and written to the state."""
    state = json.loads(options.state.read_text()) if options.state.is_file() else {}
    prefix = shlex.split(options.prefix)
    with tempfile.TemporaryDirectory() as folder:
        for label, methods, arguments in cases(options, state, pathlib.Path(folder)):
            wanted = missing(state, label, methods)
            for first in range(0, len(wanted), options.together):
                part = wanted[first:first + options.together]
                print(f"{label}: {', '.join(method.name for method in part)}", file=sys.stderr, flush=True)
                report = run_json([*prefix, options.binary, "compare", "--methods", ",".join(m.spec for m in part),
                                   *arguments, "--densities", "1", "--repeats", str(options.repeats), "--query-blocks", "4",
                                   "--threads", str(options.threads), "--cpu-time", "--json"])
                for row in report["rows"]:
                    if row["target_density"] is None:
                        state[f"{label} | {row['spec']}"] = row
                for skipped in report["skipped"]:
                    print(f"  left out: {skipped}", file=sys.stderr)
                options.state.write_text(json.dumps(state, indent=1))
    return state


def mass_of(row):
    """Share of dense probability that is computed; none for methods that estimate scores or denominators."""
    return None if row["method"] in ("delta-llm", "hyper") else (row.get("error") or {}).get("softmax_mass")


def number(value, digits=3):
    """A cell; what a method does not have stays empty."""
    return "" if value is None else f"{value:.{digits}f}"


def table(state, label):
    """The rows of one case as Markdown."""
    lines = ["| method | density | mass | relative L2 error | selection / dense | speed-up |", "|---|---|---|---|---|---|"]
    for method in METHODS:
        row = state.get(f"{label} | {method.spec}")
        if row is None:
            continue
        error = row.get("error") or {}
        lines.append(f"| `{method.spec}` | {number(row['density'])} | {number(mass_of(row))} | {number(error.get('rel_l2'))} | "
                     f"{number(row['selection_share'])} | {number(row['speed_up'], 2)} |")
    return "\n".join(lines)


def markdown(options, state):
    """docs/prefill-results.md."""
    labels = {key.partition(" | ")[0] for key in state if not key.startswith("home ")}
    labels = sorted(labels, key=lambda label: (int(label.split()[1]), (*ARCHETYPES, "model").index(label.split()[0])))
    text = ["# Prefill methods: what they keep, lose and cost", "",
            "Written by `benchmarks/prefill_table.py` from `tessera compare` ([comparing.md](comparing.md) says what the "
            "columns mean): every method at its published defaults, head dim 128, bf16, one kv head (the model: as it is).",
            "`mass` is the share of dense softmax probability that is computed, the mean over all rows; it is empty for "
            "methods that estimate scores or denominators. `selection / dense` is the CPU time of choosing over that of "
            "dense attention in the same run, `speed-up` dense over choosing plus running.", ""]
    if options.note:
        text += [options.note, ""]
    for label in labels:
        archetype, _, length = label.partition(" ")
        source = "What the embedded model attends to" if archetype == "model" else f"`{archetype}`"
        text += [f"## {source}, {int(length):,} tokens", "", table(state, label), ""]
    claimed = [(method, home_of(options, method)) for method in METHODS]
    claimed = [(method, home, state[f"{home} | {method.spec}"]) for method, home in claimed if f"{home} | {method.spec}" in state]
    if claimed:
        text += ["## Each method at home, beside its paper", "",
                 "| method | archetype | tokens | density | mass | selection / dense | speed-up | the paper | why it differs |",
                 "|---|---|---|---|---|---|---|---|---|"]
        for method, home, row in claimed:
            text.append(f"| `{method.spec}` | `{method.home}` | {int(home.split()[2]):,} | {number(row['density'])} | "
                        f"{number(mass_of(row))} | {number(row['selection_share'])} | {number(row['speed_up'], 2)} | "
                        f"{method.claim} | {method.why} |")
        text.append("")
    text += [MISSES, ""]
    return "\n".join(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary", type=pathlib.Path)
    parser.add_argument("--lengths", default="8192:8,32768:2", help="tokens:query heads, ...")
    parser.add_argument("--long", default="131072:1", help="tokens:query heads of the comparison with papers; empty: none")
    parser.add_argument("--model-tokens", default="8192", help="bytes that the model reads, ...; empty: no model")
    parser.add_argument("--model-layers", default="0+1+3", help="layers whose heads are compared")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--together", type=int, default=4, help="methods per run of tessera")
    parser.add_argument("--prefix", default="", help="command put before every run, to wait for a quiet machine")
    parser.add_argument("--state", type=pathlib.Path, default=pathlib.Path("prefill_table.json"))
    parser.add_argument("--out", type=pathlib.Path, help="Markdown file")
    parser.add_argument("--note", default="", help="a line about the machine")
    options = parser.parse_args()
    text = markdown(options, measure(options))
    if options.out:
        options.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
