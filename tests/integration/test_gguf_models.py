# SPDX-License-Identifier: Apache-2.0
"""Small random GGUF models: logits against llama-cpp-python on the same file, tokens against it, chat templates."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

np = pytest.importorskip("numpy")
gguf = pytest.importorskip("gguf")
safetensors_numpy = pytest.importorskip("safetensors.numpy")
Quant = gguf.GGMLQuantizationType

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 256, 512, 4, 2, 64, 3
Q, KV = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
TEXT = "The quick brown fox jumps over the lazy dog; the rest is silence. 注意力 café 12345\n\n  indented"


def byte_characters() -> list[str]:
    """GPT-2's table."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


def gpt2_vocabulary() -> tuple[list[str], list[int], list[str]]:
    """Tokens, their types and merges."""
    tokens = byte_characters()
    merges = ["t h", "th e", "Ġ the", "q u", "i c", "qu ic", "quic k", "o x", "f ox", "Ġ fox", "r e", "e s", "1 2"]
    tokens += [merge.replace(" ", "") for merge in merges]
    types = [1] * len(tokens) + [3, 3, 4]
    return [*tokens, "<|begin|>", "<|end|>", "<tool>"], types, merges


def write_gpt2(writer: Any, pre: str = "llama-bpe") -> int:
    tokens, types, merges = gpt2_vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokens.index("<|begin|>"))
    writer.add_eos_token_id(tokens.index("<|end|>"))
    writer.add_add_bos_token(True)
    return len(tokens)


def write_sentencepiece(writer: Any) -> int:
    word = "\u2581"
    pieces = ["th", "the", word + "the", "qu", "ick", "ic", "quick", word + "quick", "ox", "fox", word + "fox", "he",
              word + "t", "es", "re", "est", "rest", word + word]
    letters = [word, *"abcdefghijklmnopqrstuvwxyzABCDEFT.,;:"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces, *letters]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(pieces) + len(letters))]
    scores = [0.0] * 259 + [-float(i // 2) for i in range(len(pieces))] + [-100.0 - i for i in range(len(letters))]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    return len(tokens)


def write_model(path: Path, architecture: str, weights: Any = Quant.F32, tokenizer: Any = write_gpt2,
                seed: int = 1, writer_type: Any = gguf.GGUFWriter, **options: Any) -> None:
    """A random model. Matrices have the type `weights`, norms and biases are F32."""
    generator = np.random.default_rng(seed)
    writer = writer_type(path, architecture)
    writer.add_context_length(1024)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HEAD_DIM)
    experts = options.get("experts", 0)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(INNER)
    if "window" in options:
        writer.add_sliding_window(options["window"])
    if "template" in options:
        writer.add_chat_template(options["template"])
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(50.0)
        writer.add_final_logit_softcapping(30.0)
    vocabulary = tokenizer(writer)

    def matrix(name: str, *shape: int, scale: float = 0.08) -> None:
        numbers = generator.normal(scale=scale, size=shape).astype(np.float32)
        if weights in (Quant.Q2_K, Quant.Q3_K, Quant.Q4_K, Quant.Q5_K, Quant.Q6_K):
            writer.add_tensor(name, random_k(numbers.shape, weights, generator, scale), raw_dtype=weights)
        else:
            writer.add_tensor(name, gguf.quants.quantize(numbers, weights), raw_dtype=weights)

    def vector(name: str, size: int, mean: float = 1.0) -> None:
        writer.add_tensor(name, (mean + generator.uniform(-0.3, 0.3, size)).astype(np.float32))

    matrix("token_embd.weight", vocabulary, HIDDEN, scale=0.5)
    vector("output_norm.weight", HIDDEN)
    if not options.get("tied", architecture.startswith("gemma")):
        matrix("output.weight", vocabulary, HIDDEN)
    for i in range(LAYERS):
        layer = f"blk.{i}."
        vector(layer + "attn_norm.weight", HIDDEN)
        vector(layer + "ffn_norm.weight", HIDDEN)
        if architecture == "phi3":
            matrix(layer + "attn_qkv.weight", Q + 2 * KV, HIDDEN)
            matrix(layer + "ffn_up.weight", 2 * INNER, HIDDEN)
        else:
            matrix(layer + "attn_q.weight", Q, HIDDEN)
            matrix(layer + "attn_k.weight", KV, HIDDEN)
            matrix(layer + "attn_v.weight", KV, HIDDEN)
        if architecture == "qwen2":
            vector(layer + "attn_q.bias", Q, 0)
            vector(layer + "attn_k.bias", KV, 0)
            vector(layer + "attn_v.bias", KV, 0)
        if architecture in ("qwen3", "qwen3moe", "gemma3"):
            vector(layer + "attn_q_norm.weight", HEAD_DIM)
            vector(layer + "attn_k_norm.weight", HEAD_DIM)
        if architecture in ("gemma2", "gemma3"):
            vector(layer + "post_attention_norm.weight", HIDDEN)
            vector(layer + "post_ffw_norm.weight", HIDDEN)
        matrix(layer + "attn_output.weight", HIDDEN, Q)
        if experts:
            writer.add_tensor(layer + "ffn_gate_inp.weight",
                              generator.normal(scale=0.2, size=(experts, HIDDEN)).astype(np.float32))
            matrix(layer + "ffn_gate_exps.weight", experts, INNER, HIDDEN)
            matrix(layer + "ffn_up_exps.weight", experts, INNER, HIDDEN)
            matrix(layer + "ffn_down_exps.weight", experts, HIDDEN, INNER)
        else:
            if architecture != "phi3":
                matrix(layer + "ffn_gate.weight", INNER, HIDDEN)
                matrix(layer + "ffn_up.weight", INNER, HIDDEN)
            matrix(layer + "ffn_down.weight", HIDDEN, INNER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_k(shape: tuple[int, ...], kind: Any, generator: Any, scale: float) -> Any:
    """Random blocks of a K type whose numbers have about this spread: the package does not quantise to them."""
    _, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = int(np.prod(shape)) // 256
    data = generator.integers(0, 256, (blocks, size), dtype=np.uint8)
    scales, minima = {Quant.Q2_K: (80, 82), Quant.Q3_K: (108, None), Quant.Q4_K: (0, 2), Quant.Q5_K: (0, 2),
                      Quant.Q6_K: (208, None)}[kind]
    for at in (scales, minima):
        if at is not None:
            data[:, at:at + 2] = np.full((blocks, 1), 1.0, np.float16).view(np.uint8)
    spread = np.abs(gguf.quants.dequantize(data, kind)).mean(axis=1, keepdims=True)
    for at in (scales, minima):
        if at is not None:
            data[:, at:at + 2] = (scale / spread).astype(np.float16).view(np.uint8)
    return data.reshape(*shape[:-1], shape[-1] // 256 * size)


def run(tessera: Path, model: Path, folder: Path, text: str = TEXT, *options: str) -> tuple[dict[str, Any], Any]:
    """The report and the logits of the prompt."""
    (folder / "prompt").write_text(text, encoding="utf-8")
    command = [tessera, "run", "--model", model, "--prompt", folder / "prompt", "--json", "--ignore-eos",
               "--logits-out", folder / "logits.safetensors", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), safetensors_numpy.load_file(folder / "logits.safetensors")["logits"]


def peer(model: Path) -> Any:
    """The file in llama.cpp, with a cache of float32."""
    llama_cpp = pytest.importorskip("llama_cpp")
    return llama_cpp.Llama(str(model), n_ctx=512, n_batch=512, n_ubatch=512, logits_all=True, verbose=False,
                           n_threads=2, n_threads_batch=2, type_k=0, type_v=0, flash_attn=False, use_mmap=True)


def peer_tokens_and_logits(model: Path, text: str = TEXT) -> tuple[list[int], Any, Any]:
    llama = peer(model)
    tokens = llama.tokenize(text.encode(), add_bos=True, special=False)
    llama.eval(tokens)
    return tokens, np.array(llama.scores[:len(tokens)]), llama


MODELS: dict[str, dict[str, Any]] = {
    "llama": {"architecture": "llama"},
    "llama-tied-sentencepiece": {"architecture": "llama", "tied": True, "tokenizer": write_sentencepiece},
    "qwen2": {"architecture": "qwen2"},
    "qwen3": {"architecture": "qwen3"},
    "gemma2": {"architecture": "gemma2", "window": 24},
    "gemma3": {"architecture": "gemma3", "window": 24},
    "phi3": {"architecture": "phi3"},
    "mixtral": {"architecture": "llama", "experts": 4},
    "qwen3moe": {"architecture": "qwen3moe", "experts": 4},
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_agree_with_llama_cpp(tessera: Path, tmp_path: Path, name: str) -> None:
    """Tokens are equal, and so are logits of float32 weights up to rounding."""
    path = tmp_path / "model.gguf"
    write_model(path, **MODELS[name])
    tokens, expected, _ = peer_tokens_and_logits(path)
    report, logits = run(tessera, path, tmp_path, TEXT, "-n", "0")
    assert report["prompt_tokens"] == len(tokens)
    assert logits.shape == expected.shape
    # llama.cpp looks GELU up in a table of f16, which test_gelu_of_gemma() tells apart.
    assert np.abs(logits - expected).max() < (4e-3 if name.startswith("gemma") else 2e-3)


def gelu(x: Any) -> Any:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_of_table(x: Any) -> Any:
    """As llama.cpp has it between -10 and 10: of x as f16, and as f16."""
    half = gelu(x.astype(np.float16).astype(np.float64)).astype(np.float16).astype(np.float64)
    return np.where(x <= -10, 0, np.where(x >= 10, x, half))


def gemma_logits(path: Path, name: str, tokens: list[int], window: int, activation: Any) -> Any:
    """Gemma 2 or 3 by its definition, in float64."""
    weights = {tensor.name: np.array(tensor.data, np.float64).reshape(tensor.shape[::-1])
               for tensor in gguf.GGUFReader(path).tensors}
    places = np.arange(len(tokens))
    angles = places[:, None, None] * 10000.0 ** (-np.arange(HEAD_DIM // 2) * 2 / HEAD_DIM)
    distance = places[:, None] - places

    def norm(x: Any, gain: Any) -> Any:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * gain

    def rotate(x: Any) -> Any:
        first, second = np.split(x, 2, -1)
        return np.concatenate([first * np.cos(angles) - second * np.sin(angles),
                               first * np.sin(angles) + second * np.cos(angles)], -1)

    hidden = weights["token_embd.weight"][tokens] * np.sqrt(HIDDEN)
    for i in range(LAYERS):
        layer = {key.split(".")[2]: value for key, value in weights.items() if key.startswith(f"blk.{i}.")}
        x = norm(hidden, layer["attn_norm"])
        q = (x @ layer["attn_q"].T).reshape(-1, HEADS, HEAD_DIM)
        k = (x @ layer["attn_k"].T).reshape(-1, KV_HEADS, HEAD_DIM)
        v = (x @ layer["attn_v"].T).reshape(-1, KV_HEADS, HEAD_DIM)
        if name == "gemma3":
            q, k = norm(q, layer["attn_q_norm"]), norm(k, layer["attn_k_norm"])
        k, v = (np.repeat(t, HEADS // KV_HEADS, 1) for t in (rotate(k), v))
        scores = np.einsum("qhd,khd->hqk", rotate(q), k) / np.sqrt(HEAD_DIM)
        if name == "gemma2":
            scores = 50 * np.tanh(scores / 50)
        is_local = i % 2 == 0 if name == "gemma2" else i % 6 != 5
        seen = (distance >= 0) & ((distance < window) | (not is_local))
        p = np.where(seen, np.exp(scores - scores.max(-1, keepdims=True)), 0)
        attended = np.einsum("hqk,khd->qhd", p / p.sum(-1, keepdims=True), v).reshape(len(tokens), -1)
        hidden = hidden + norm(attended @ layer["attn_output"].T, layer["post_attention_norm"])
        x = norm(hidden, layer["ffn_norm"])
        inner = activation(x @ layer["ffn_gate"].T) * (x @ layer["ffn_up"].T)
        hidden = hidden + norm(inner @ layer["ffn_down"].T, layer["post_ffw_norm"])
    logits = norm(hidden, weights["output_norm.weight"]) @ weights["token_embd.weight"].T
    return 30 * np.tanh(logits / 30) if name == "gemma2" else logits


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_gelu_of_gemma(tessera: Path, tmp_path: Path, name: str) -> None:
    """Logits are those of the definition; llama.cpp's are those of GELU by a table of f16, and no others."""
    path = tmp_path / "model.gguf"
    write_model(path, **MODELS[name])
    tokens, theirs, _ = peer_tokens_and_logits(path)
    _, logits = run(tessera, path, tmp_path, TEXT, "-n", "0")
    window = MODELS[name]["window"]
    exact = gemma_logits(path, name, tokens, window, gelu)
    of_table = gemma_logits(path, name, tokens, window, gelu_of_table)
    assert np.abs(logits - exact).max() < 3e-4  # measured: 1e-4
    assert np.abs(theirs - of_table).max() < 1.5e-3  # 7e-4: some numbers round to the neighbour in the table
    assert np.abs(theirs - exact).max() > 1.5e-3  # 2e-3


class WideningWriter(gguf.GGUFWriter):
    """Writes every tensor as float32."""

    def add_tensor(self, name: str, tensor: Any, raw_shape: Any = None, raw_dtype: Any = None, **rest: Any) -> None:
        if raw_dtype is not None:
            tensor = np.ascontiguousarray(gguf.quants.dequantize(tensor, raw_dtype).astype(np.float32))
        super().add_tensor(name, tensor, raw_shape=raw_shape, **rest)


KINDS = ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


def models_of(kind: str, folder: Path) -> tuple[Path, Path]:
    """A model whose weights have a type, and the same numbers as float32."""
    stored, wide = folder / "stored.gguf", folder / "wide.gguf"
    write_model(stored, "llama", Quant[kind])
    write_model(wide, "llama", Quant[kind], writer_type=WideningWriter)
    return stored, wide


@pytest.mark.parametrize("kind", KINDS)
def test_exact_products_of_stored_weights(tessera: Path, tmp_path: Path, kind: str) -> None:
    """Are those of the float32 model of the same numbers, in prefill and token by token."""
    stored, wide = models_of(kind, tmp_path)
    _, expected = run(tessera, wide, tmp_path, TEXT, "-n", "0", "--exact-products")
    for options in ([], ["--chunk", "1"]):
        _, logits = run(tessera, stored, tmp_path, TEXT, "-n", "0", "--exact-products", *options)
        assert float(np.abs(logits - expected).max()) < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_rounded_products_are_as_near_as_those_of_llama_cpp(tessera: Path, tmp_path: Path, kind: str) -> None:
    """Both round activations, in their own ways: errors against exact products are compared."""
    stored, wide = models_of(kind, tmp_path)
    _, expected = run(tessera, wide, tmp_path, TEXT, "-n", "0", "--exact-products")
    tokens, theirs, _ = peer_tokens_and_logits(stored)
    assert theirs.shape == expected.shape == (len(tokens), expected.shape[1])
    error_of_peer = float(np.abs(theirs - expected).mean())
    for options in ([], ["--chunk", "1"]):
        _, logits = run(tessera, stored, tmp_path, TEXT, "-n", "0", *options)
        assert float(np.abs(logits - expected).mean()) < 1.5 * error_of_peer + 0.004 * float(expected.std())


def test_tokens_agree_with_llama_cpp(tessera: Path, tmp_path: Path) -> None:
    """Of both kinds of vocabularies."""
    texts = [TEXT, "", " ", "  the  the", "thethe fox\n", "<tool> x <|begin|><s>", "😀 é ﷺ\u0301", "x" * 5000]
    for tokenizer in (write_gpt2, write_sentencepiece):
        path = tmp_path / f"{tokenizer.__name__}.gguf"
        write_model(path, "llama", tokenizer=tokenizer)
        llama = peer(path)
        for text in texts:
            for special in (False, True):
                prompt = tmp_path / "prompt"
                prompt.write_text(text, encoding="utf-8")
                done = subprocess.run([tessera, "tokenize", "--model", path, "--prompt", prompt, "--json",
                                       *(["--special"] if special else [])],
                                      capture_output=True, text=True, timeout=60, check=True)
                expected = llama.tokenize(text.encode(), add_bos=False, special=special)
                assert json.loads(done.stdout)["tokens"] == expected, (tokenizer.__name__, repr(text[:60]), special)


def test_refusals(tessera: Path, tmp_path: Path) -> None:
    """Messages name what is wrong."""
    path = tmp_path / "model.gguf"
    write_model(path, "llama")
    (tmp_path / "prompt").write_text("x")

    def message(*arguments: Any) -> str:
        done = subprocess.run([tessera, "run", "--prompt", tmp_path / "prompt", *arguments], capture_output=True,
                              text=True, timeout=60, check=False)
        assert done.returncode == 2
        return done.stderr

    assert "the model has no chat template" in message("--model", path, "--chat")
    (tmp_path / "short.gguf").write_bytes(path.read_bytes()[:100_000])
    assert "short.gguf" in message("--model", tmp_path / "short.gguf")
    other = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(other, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "'mamba' is not supported; supported: llama, qwen2" in message("--model", other)
