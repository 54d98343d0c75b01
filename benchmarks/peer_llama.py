#!/usr/bin/env python3
"""Prefill and decoding of a whole model against llama.cpp, on the same GGUF file with the same threads.

    benchmarks/peer_llama.py --tessera build/release/bin/tessera [--shape 0.5b] [--type q8_0] [--lengths 2048,8192]

Writes a model of the shape of Qwen2.5 with random weights, then lets the runners take turns, each measurement in a
process of its own, so that its peak memory is that of the runner. llama.cpp runs through llama-cpp-python with flash
attention and a cache of f16; Tessera has a cache of bf16. --transformers adds Hugging Face Transformers on PyTorch with
a model of the same shape in bf16. Every row is a median; `x llama` above 1 is better than llama.cpp, memory excepted.

Random weights alone give flat attention, at which a selection by threshold keeps nearly everything. --locality adds
biases to queries and keys that make near keys weigh more, as trained models do; dense attention takes the same time
with and without. The density that a method arrives at stands in its row.

`of bandwidth` is what a token reads, weights and the keys and values of the context. Tessera's is the median over its
steps, each against the passes over memory before and behind it (`run --measure-bandwidth`); llama.cpp's goes by the
median of `tessera bench peak` before and after every turn, the best that memory gave. Rows that are no multiple of
256 have no K type: as llama.cpp does it, Q4_K becomes Q5_0 there, and the tied output matrix of Q4_K models is Q6_K or
Q8_0. Needs llama-cpp-python and gguf.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SHAPES = {
    "0.5b": {"layers": 24, "hidden": 896, "heads": 14, "kv_heads": 2, "dim": 64, "inner": 4864},
    "1.5b": {"layers": 28, "hidden": 1536, "heads": 12, "kv_heads": 2, "dim": 128, "inner": 8960},
}
VOCABULARY = 151936
ROPE_BASE = 1e6
BATCH, UBATCH = 2048, 512


def log(text):
    print(text, file=sys.stderr, flush=True)


# --- The model -------------------------------------------------------------------------------------------------------


def tokens_of_vocabulary():
    """Bytes as GPT-2 writes them, then words that no prompt contains; the last one ends a text."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    letters = [chr(b) if b in printable else chr(next(spare)) for b in range(256)]
    return [*letters, "AB", *(f"<{i}>" for i in range(257, VOCABULARY - 1)), "<|end|>"]


def type_of_matrix(kind, columns, is_output):
    """The type that llama.cpp's quantisation gives a matrix in a file of this kind."""
    if kind != "q4_k":
        return kind
    if columns % 256 != 0:
        return "q8_0" if is_output else "q5_0"
    return "q6_k" if is_output else "q4_k"


def random_rows(random, kind, rows, columns, spread):
    """Bytes [rows, bytes of a row] of random numbers with about this standard deviation."""
    if kind == "bf16":
        numbers = random.standard_normal((rows, columns), dtype=np.float32) * np.float32(spread)
        return np.ascontiguousarray(numbers.view(np.uint16)[:, 1::2]).view(np.uint8)
    # Bytes of a block, numbers in it, places of f16 scales with the spread of the codes that each multiplies.
    size, numbers, scales = {
        "q8_0": (34, 32, {0: 73.9}),
        "q5_0": (22, 32, {0: 9.2}),
        "q4_k": (144, 256, {0: 255.0, 2: 255.0 / 7.5}),
        "q6_k": (210, 256, {208: 1365.0}),
    }[kind]
    data = np.frombuffer(random.bytes(rows * columns // numbers * size), np.uint8).reshape(-1, size).copy()
    for place, codes in scales.items():
        data[:, place : place + 2] = np.array([spread / codes], np.float16).view(np.uint8)
    return data.reshape(rows, -1)


def local_bias(heads, dim, strength):
    """[heads * dim]: with it in queries and keys, near keys score up to `strength` above far ones (rotated in halves).

    The pairs of the rotation whose wave is longer than 64 tokens share the strength, so that their sum falls with the
    distance.
    """
    pairs = ROPE_BASE ** (-np.arange(dim // 2) * 2 / dim)
    chosen = pairs < 2 * np.pi / 64
    size = np.sqrt(strength * np.sqrt(dim) / chosen.sum())
    return np.tile(np.concatenate([size * chosen, 0 * chosen]), heads).astype(np.float32)


def write_model(path, shape, kind, layers, longest, locality):
    """Writes the model tensor by tensor."""
    import gguf

    random = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(longest)
    writer.add_embedding_length(shape["hidden"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(shape["inner"])
    writer.add_head_count(shape["heads"])
    writer.add_head_count_kv(shape["kv_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    tokens = tokens_of_vocabulary()
    writer.add_token_list(tokens)
    writer.add_token_types([*[1] * (len(tokens) - 1), 3])
    writer.add_token_merges(["A B"])  # letters of no prompt
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_add_bos_token(False)

    hidden, inner = shape["hidden"], shape["inner"]
    q, kv = shape["heads"] * shape["dim"], shape["kv_heads"] * shape["dim"]
    data = []  # functions that make the tensors, in the order of the file

    def matrix(name, rows, columns, is_output=False):
        own = type_of_matrix(kind, columns, is_output)
        spread = 0.02 if is_output else columns**-0.5
        raw = gguf.GGMLQuantizationType[own.upper()]
        numbers, size = gguf.GGML_QUANT_SIZES[raw]
        width = columns // numbers * size
        writer.add_tensor_info(name, (rows, width), np.dtype(np.uint8), rows * width, raw_dtype=raw)
        data.append(lambda: random_rows(random, own, rows, columns, spread))

    def vector(name, values):
        values = values.astype(np.float32)
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
        data.append(lambda: values)

    matrix("token_embd.weight", VOCABULARY, hidden, is_output=True)
    vector("output_norm.weight", np.ones(hidden))
    for i in range(layers):
        for name, rows, columns in [
            ("attn_q", q, hidden), ("attn_k", kv, hidden), ("attn_v", kv, hidden), ("attn_output", hidden, q),
            ("ffn_gate", inner, hidden), ("ffn_up", inner, hidden), ("ffn_down", hidden, inner),
        ]:  # fmt: skip
            matrix(f"blk.{i}.{name}.weight", rows, columns)
        for name in ("attn_norm", "ffn_norm"):
            vector(f"blk.{i}.{name}.weight", np.ones(hidden))
        vector(f"blk.{i}.attn_q.bias", local_bias(shape["heads"], shape["dim"], locality))
        vector(f"blk.{i}.attn_k.bias", local_bias(shape["kv_heads"], shape["dim"], locality))
        vector(f"blk.{i}.attn_v.bias", np.zeros(kv))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for make in data:
        writer.write_tensor_data(make())
    writer.close()


def bytes_of_weights(path):
    """All tensors, which decoding a token reads: the embedding is the output matrix as well."""
    import gguf

    return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors)


# --- The runners, each in a process of its own -----------------------------------------------------------------------


def run_llama(options):
    """Prefill in batches, then token by token; prints a line of JSON."""
    import llama_cpp

    text = Path(options.prompt).read_bytes()
    llama = llama_cpp.Llama(
        options.model, n_ctx=len(text) + options.decode + 8, n_batch=BATCH, n_ubatch=UBATCH,
        n_threads=options.threads, n_threads_batch=options.threads, flash_attn=True, verbose=False,
    )  # fmt: skip
    tokens = llama.tokenize(text, add_bos=False)

    def timed(tokens):
        start = time.perf_counter()
        llama.eval(tokens)
        llama_cpp.llama_synchronize(llama._ctx.ctx)
        return time.perf_counter() - start

    prefill = timed(tokens)
    decode = sum(timed([tokens[i]]) for i in range(options.decode))
    report(len(tokens), prefill, options.decode / decode)


def run_transformers(options):
    import torch
    from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

    torch.set_num_threads(options.threads)
    shape = SHAPES[options.shape]
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=shape["hidden"], intermediate_size=shape["inner"],
        num_hidden_layers=options.layers, num_attention_heads=shape["heads"], num_key_value_heads=shape["kv_heads"],
        head_dim=shape["dim"], max_position_embeddings=1 << 17, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(1)
    model = Qwen2ForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    tokens = torch.tensor([list(Path(options.prompt).read_bytes())])
    cache = DynamicCache()

    def timed(tokens):
        start = time.perf_counter()
        model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - start

    with torch.no_grad():
        prefill = timed(tokens)
        decode = sum(timed(tokens[:, i : i + 1]) for i in range(options.decode))
    report(tokens.shape[1], prefill, options.decode / decode)


def report(tokens, prefill, decode):
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    print(json.dumps({"prompt_tokens": tokens, "prefill_ms": prefill * 1e3, "decode_tokens_per_s": decode,
                      "peak_rss_mb": peak}))  # fmt: skip


def measure(options, runner, model, prompt, layers):
    if runner in ("llama.cpp", "transformers"):
        python = options.llama_python if runner == "llama.cpp" else options.transformers_python
        command = [python, __file__, "--worker", runner, "--model", model, "--prompt", prompt, "--layers",
                   layers, "--threads", options.threads, "--decode", options.decode, "--shape", options.shape]  # fmt: skip
    else:
        command = [options.tessera, "run", "--model", model, "--prompt", prompt, "--method", runner, "--kv-dtype",
                   "bf16", "-n", options.decode + 1, "--threads", options.threads, "--ignore-eos", "--json",
                   "--no-bits-per-byte", "--measure-bandwidth"]  # fmt: skip
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{runner} failed:\n{done.stderr}")
    return json.loads(done.stdout)


# --- The table -------------------------------------------------------------------------------------------------------


def summarise(options, samples, length, weights, bandwidth):
    """A row per runner of one length."""
    shape = SHAPES[options.shape]
    per_token = 2 * 2 * options.layers * shape["kv_heads"] * shape["dim"]  # keys and values of 2 bytes
    rows = []
    for runner, reports in samples.items():
        row = {"length": length, "runner": runner}
        for key in ("prefill_ms", "decode_tokens_per_s", "peak_rss_mb", "density", "read_gbps",
                    "decode_of_bandwidth"):  # fmt: skip
            if key in reports[0]:
                row[key] = statistics.median(report[key] for report in reports)
        if runner == "llama.cpp":  # the weights of Transformers are bf16
            read = weights + per_token * length
            row["decode_of_bandwidth"] = read * row["decode_tokens_per_s"] / 1e9 / bandwidth
        rows.append(row)
    peer = next(row for row in rows if row["runner"] == "llama.cpp")
    for row in rows:
        row["prefill_over_llama"] = peer["prefill_ms"] / row["prefill_ms"]
        row["decode_over_llama"] = row["decode_tokens_per_s"] / peer["decode_tokens_per_s"]
        row["memory_over_llama"] = row["peak_rss_mb"] / peer["peak_rss_mb"]
    return rows


def print_rows(rows):
    head = ("length", "runner", "density", "prefill ms", "x llama", "decode/s", "x llama", "GB/s", "of bandwidth",
            "peak MB", "x llama")  # fmt: skip
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for row in rows:
        cells = [
            str(row["length"]), f"`{row['runner']}`", f"{row['density']:.3f}" if "density" in row else "",
            f"{row['prefill_ms']:.0f}", f"{row['prefill_over_llama']:.2f}", f"{row['decode_tokens_per_s']:.1f}",
            f"{row['decode_over_llama']:.2f}",
            f"{row['read_gbps']:.1f}" if "read_gbps" in row else "",
            f"{row['decode_of_bandwidth']:.2f}" if "decode_of_bandwidth" in row else "",
            f"{row['peak_rss_mb']:.0f}", f"{row['memory_over_llama']:.2f}",
        ]  # fmt: skip
        print("| " + " | ".join(cells) + " |", flush=True)


def measure_bandwidth(options):
    command = [options.tessera, "bench", "peak", "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["read_gbps"]


def compare(options, folder):
    shape = SHAPES[options.shape]
    lengths = [int(x) for x in options.lengths.split(",")]
    model = folder / f"{options.shape}-{options.type}-{options.layers}-{options.locality:g}.gguf"
    log(f"making {model.name}")
    # Not by this process, which stays small beside those that it starts.
    weights = int(subprocess.run(
        [options.llama_python, __file__, "--worker", "write", "--model", str(model), "--shape", options.shape, "--type",
         options.type, "--layers", str(options.layers), "--locality", str(options.locality)],
        check=True, stdout=subprocess.PIPE, text=True).stdout)  # fmt: skip
    bandwidths = [measure_bandwidth(options)]
    log(f"{model.stat().st_size / 1e6:.0f} MB, {weights / 1e6:.0f} MB read per token, {bandwidths[0]:.1f} GB/s")
    runners = ["llama.cpp", *(["transformers"] if options.transformers else []), *options.methods.split(";")]
    taken = []
    for length in lengths:
        prompt = folder / "prompt"
        letters = np.random.default_rng(2).integers(ord("a"), ord("z") + 1, length, dtype=np.uint8)
        prompt.write_bytes(letters.tobytes())
        samples = {runner: [] for runner in runners}
        for turn in range(options.repeats):
            for runner in runners:
                result = measure(options, runner, model, prompt, options.layers)
                if result["prompt_tokens"] != length:
                    sys.exit(f"{runner} saw {result['prompt_tokens']} tokens; expected {length}")
                samples[runner].append(result)
                log(f"{length} tokens, turn {turn + 1} of {options.repeats}, {runner}: prefill "
                    f"{result['prefill_ms']:.0f} ms, decode {result['decode_tokens_per_s']:.1f} tokens/s, "
                    f"{result['peak_rss_mb']:.0f} MB")  # fmt: skip
            bandwidths.append(measure_bandwidth(options))
        taken.append((length, samples))
    bandwidth = statistics.median(bandwidths)
    log("GB/s: " + ", ".join(f"{value:.1f}" for value in bandwidths))
    rows = [row for length, samples in taken for row in summarise(options, samples, length, weights, bandwidth)]
    title = (f"{options.shape} ({options.layers} of {shape['layers']} layers), {options.type}, {options.threads} "
             f"threads, {bandwidth:.1f} GB/s, medians of {options.repeats}")  # fmt: skip
    if options.json:
        print(json.dumps({"title": title, "bandwidth_gbps": bandwidth, "weight_bytes": weights, "rows": rows}, indent=2))
    else:
        print(title + "\n")
        print_rows(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tessera", help="the binary")
    parser.add_argument("--shape", default="0.5b", choices=sorted(SHAPES))
    parser.add_argument("--type", default="q8_0", choices=["q8_0", "q4_k", "bf16"])
    parser.add_argument("--lengths", default="2048,8192")
    parser.add_argument("--methods", default="dense;xattention:tau=0.9,stride=16", help="SPECs, separated by semicolons")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as the machine has")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--decode", type=int, default=32, help="tokens")
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than the shape has, for long prompts")
    parser.add_argument("--locality", type=float, default=8.0, help="by how much near keys score above far ones")
    parser.add_argument("--transformers", action="store_true", help="measure Transformers too")
    parser.add_argument("--llama-python", default=sys.executable, help="interpreter that has llama_cpp and gguf")
    parser.add_argument("--transformers-python", default=sys.executable, help="that has torch and transformers")
    parser.add_argument("--keep", help="folder where the model stays for the next run")
    parser.add_argument("--json", action="store_true")
    for hidden in ("worker", "model", "prompt"):
        parser.add_argument(f"--{hidden}", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.threads = options.threads or len(os.sched_getaffinity(0))
    options.layers = options.layers or SHAPES[options.shape]["layers"]
    if options.worker == "llama.cpp":
        run_llama(options)
    elif options.worker == "transformers":
        run_transformers(options)
    elif options.worker == "write":
        if not Path(options.model).exists():
            write_model(options.model, SHAPES[options.shape], options.type, options.layers, 1 << 17, options.locality)
        print(bytes_of_weights(options.model))
    elif not options.tessera:
        parser.error("--tessera is missing")
    elif options.keep:
        Path(options.keep).mkdir(parents=True, exist_ok=True)
        compare(options, Path(options.keep))
    else:
        with tempfile.TemporaryDirectory() as folder:
            compare(options, Path(folder))


if __name__ == "__main__":
    main()
