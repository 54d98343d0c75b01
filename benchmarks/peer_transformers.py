#!/usr/bin/env python3
"""A prefill by Hugging Face Transformers with Tessera's attention against its own: one model, one process, in turn.

    python benchmarks/peer_transformers.py [--lengths 8192,32768] [--methods "dense;xattention:tau=0.9"] [--dtype bf16]

The model is a Llama of two layers with random weights, by default with the heads of Llama 3.2 1B doubled in size: the
time is that of the whole forward pass, projections included, with the logits of the last token. Random weights give flat
attention, at which selectors by threshold keep nearly everything: what they cost is shown, not what they save; patterns
and selectors by count save what their density says. Needs `pip install .[transformers]`.
"""

import argparse
import json
import os
import statistics
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

import tessera  # noqa: E402
from tessera.integrations import transformers as integration  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


def make_model(options):
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=options.heads * options.dim,
        intermediate_size=3 * options.heads * options.dim,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        head_dim=options.dim,
        max_position_embeddings=1 << 20,
    )
    return LlamaForCausalLM._from_config(config, dtype=DTYPES[options.dtype]).eval()


def prefill(model, tokens):
    start = time.perf_counter()
    logits = model(tokens, use_cache=False, logits_to_keep=1).logits
    return (time.perf_counter() - start) * 1e3, logits


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="8192,32768")
    parser.add_argument(
        "--methods", default="dense;streaming:n_init=128,n_local=4096;moba:block_size=512,top_k=8;xattention:tau=0.9",
        help="SPECs, separated by semicolons",
    )  # fmt: skip
    parser.add_argument("--dtype", default="bf16", choices=sorted(DTYPES))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    model = make_model(options)
    names = {"sdpa": "sdpa"}
    for number, spec in enumerate(options.methods.split(";")):
        names[spec] = integration.register_as(f"tessera_benchmark_{number}", spec)
    print(
        f"PyTorch {torch.__version__}, Tessera on {tessera.default_isa()}, {torch.get_num_threads()} threads, "
        f"{options.layers} layers of {options.heads} / {options.kv_heads} heads of {options.dim}, {options.dtype}"
    )
    rows = []
    with torch.no_grad():
        for length in (int(x) for x in options.lengths.split(",")):
            tokens = torch.randint(0, 1000, (1, length), generator=torch.Generator().manual_seed(2))
            samples, logits = {name: [] for name in names}, {}
            for turn in range(options.repeats + 1):  # the first warms up
                for name, implementation in names.items():
                    model.set_attn_implementation(implementation)
                    taken, logits[name] = prefill(model, tokens)
                    print(f"{length} tokens, turn {turn}, {name}: {taken:.0f} ms", file=sys.stderr, flush=True)
                    if turn or options.repeats == 0:
                        samples[name].append(taken)
            expected = logits["sdpa"].float()
            for name in names:
                median = statistics.median(samples[name])
                row = {
                    "tokens": length,
                    "attention": name,
                    "ms": median,
                    "speed_up": statistics.median(samples["sdpa"]) / median,
                    "difference": ((logits[name].float() - expected).norm() / expected.norm()).item(),
                }
                if name == "dense" and not row["difference"] < 3e-2:
                    raise RuntimeError(f"dense attention and sdpa disagree: relative difference {row['difference']:.3g}")
                rows.append(row)
                print(
                    f"{length:>8} tokens  {name:<36}{median:>9.0f} ms {row['speed_up']:>7.2f}x sdpa, difference of the "
                    f"logits {row['difference']:.1e}",
                    flush=True,
                )
    if options.json:
        print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
