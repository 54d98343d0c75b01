# SPDX-License-Identifier: Apache-2.0
"""`tessera tokenize` against the package `tokenizers`, on small tokenizers of each kind that are trained here."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

tokenizers = pytest.importorskip("tokenizers")
from tokenizers import (  # noqa: E402
    AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers)

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
          r"\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
DEEPSEEK = [r"[\r\n]", r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕ]+",
            r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", r"[一-龥ࠀ-一가-퟿]+"]

CODE = '''def quick_sort(values: list[int]) -> list[int]:
    """Sorts; O(n log n)."""
    if len(values) <= 1:\n\t\treturn values   # trivial
    pivot = values[len(values) // 2]
    return [v for v in values if v < pivot] + [0x7F, 1e-9, 12345678]\r\n
#include <vector>\nint main() { std::vector<int> v{1, 2, 3}; return v[0] != 3 ? 0 : -1; } // it's, I'LL, we've\n'''
PROSE = ("The quick brown fox jumps over the lazy dog. Attention reads what matters; the rest is not computed. "
         "Don't you think it's odd that they'd say we've I'm 'tis? Numbers: 3.14159, 1,000,000 and 42nd. ") * 3
OTHER = ("人工智能的注意力机制。日本語のテキスト、カタカナとひらがな。한국어 문장도 있습니다. Привет, мир! "
         "مرحبا بالعالم. नमस्ते दुनिया। สวัสดีชาวโลก. 😀👩‍👩‍👧‍👦🇩🇪👍🏽 ½ ² Ⅻ ③ ﬁ ﬂ ｆｕｌｌ ＡＢＣ İstanbul ŞŞ ß ſ ")
MARKS = "é e\u0301 a\u0308\u0323 Z\u0351\u036b\u0343 क्षि n\u0303o\u0302 \u1100\u1161\u11a8 각 \u212b Å ﷺ "
SPACES = "  two   three\t\ttabs \u00a0nbsp\u2003em\u3000wide\u200bzero\u180emvs \n\n\n  \r\n end   \n "
TRAINING = [CODE, PROSE, OTHER, MARKS, SPACES] * 2

SPECIAL = ["<unk>", "<s>", "</s>"]
WORD = "\u2581"


def byte_level(pre: Any, normalizer: Any = None, **options: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(TRAINING, trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<|begin|>", "<|end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken(" fox", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))])
    return tokenizer


def split_then_bytes(*expressions: str) -> Any:
    splits = [pre_tokenizers.Split(Regex(e), "isolated") for e in expressions]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def with_sentencepiece_ends(tokenizer: Tokenizer, prefix: bool = True) -> Tokenizer:
    steps = [decoders.Replace(WORD, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if prefix else []))
    return tokenizer


def sentencepiece_bpe(legacy: bool, prefix: bool = True) -> Tokenizer:
    """As Llama 2 and Mistral (legacy: the normalizer puts the prefix) or Gemma (no prefix) have it."""
    byte_tokens = [f"<0x{b:02X}>" for b in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    spaces = normalizers.Replace(" ", WORD)
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(WORD), spaces] if prefix else [spaces])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    training = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    training.pre_tokenizer = pre_tokenizers.Metaspace()
    training.train_from_iterator([CODE, PROSE], trainers.BpeTrainer(
        vocab_size=900, special_tokens=SPECIAL + byte_tokens, show_progress=False))
    trained = json.loads(training.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in trained["merges"]]
    tokenizer.model = models.BPE(trained["vocab"], merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL])
    return with_sentencepiece_ends(tokenizer, prefix)


def unigram(byte_fallback: bool, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator([CODE, PROSE, MARKS], trainers.UnigramTrainer(
        vocab_size=500, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False))
    if byte_fallback:
        trained = json.loads(tokenizer.to_str())["model"]
        pieces = [tuple(p) for p in trained["vocab"]] + [(f"<0x{b:02X}>", -20.0) for b in range(256)]
        tokenizer.model = models.Unigram(pieces, trained["unk_id"], byte_fallback=True)
        with_sentencepiece_ends(tokenizer)
    return tokenizer


def with_word_options() -> Tokenizer:
    """Options that few files use: an unknown token without fusing, a suffix, digits, punctuation, added words."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation(),
                                                       pre_tokenizers.Digits(individual_digits=True)])
    tokenizer.train_from_iterator([PROSE], trainers.BpeTrainer(
        vocab_size=300, special_tokens=["[UNK]"], end_of_word_suffix="</w>", show_progress=False))
    tokenizer.add_tokens([AddedToken("LAZY", single_word=True), AddedToken("[sep]", lstrip=True, rstrip=True),
                          AddedToken("quicksilver", normalized=False)])
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


KINDS: dict[str, Any] = {
    "gpt2": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "gpt2-prefix": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "llama3": lambda: byte_level(split_then_bytes(LLAMA3), ignore_merges=True),
    "qwen": lambda: byte_level(split_then_bytes(QWEN), normalizers.NFC()),
    "deepseek": lambda: byte_level(split_then_bytes(*DEEPSEEK, r"\p{N}+")),
    "digits-gpt2": lambda: byte_level(pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])),
    "merged-with-next": lambda: byte_level(pre_tokenizers.Sequence([
        pre_tokenizers.Split(" ", "merged_with_next"), pre_tokenizers.Split(Regex(r"\p{L}+"), "contiguous"),
        pre_tokenizers.Split(Regex(r"[.,]"), "merged_with_previous"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])),
    "nfkc": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.NFKC()),
    "byte-normalizer": lambda: byte_level(pre_tokenizers.Split(Regex(r"Ġ+"), "merged_with_next"),
                                          normalizers.ByteLevel()),
    "llama2": lambda: sentencepiece_bpe(legacy=True),
    "mistral": lambda: sentencepiece_bpe(legacy=False),
    "gemma": lambda: sentencepiece_bpe(legacy=True, prefix=False),
    "unigram": lambda: unigram(False),
    "unigram-bytes": lambda: unigram(True, normalizers.NFKC()),
    "unigram-nmt": lambda: unigram(False, normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC()])),
    "word-options": with_word_options,
}

LONG = ["a" * 20000, "ab" * 5000 + "é" * 3000, "x" * 3000 + " " * 5000 + "\n" * 3000, "注意" * 4000,
        "The_Quick-Brown" * 800]
CORPUS = [PROSE, CODE, OTHER, MARKS, SPACES, "", " ", "  ", "\n", "a", "é", "😀", " a", "it'S I'LL 'ſ 've",
          "<tool>call</tool> quick fox foxes <|begin|>x<|end|> <s>y</s><unk>", "a\u0000b\u0001\u007f\ufeff\ufffd",
          "lazy LAZY LAZYness a [sep]  b[sep] quicksilver", "123456789 1234 ٣٤٥ ①②", *LONG]


def random_texts(count: int) -> list[str]:
    """Characters of every plane and kind, close together."""
    generator = random.Random(20260)
    pools = ["abcdeXYZ '.,!?", "0123456789", " \t\n\r\u00a0\u2028\u3000", "éèñöü\u0301\u0308\u0323", "漢字かなカナ한글",
             "😀👍🏽\u200d\u20e3", "".join(chr(c) for c in range(0x20, 0x2FF)),
             "".join(chr(c) for c in range(0x370, 0x1FFF) if chr(c).isprintable())]
    return ["".join(generator.choice(generator.choice(pools)) for _ in range(generator.randrange(1, 60)))
            for _ in range(count)]


@pytest.fixture(scope="module", params=KINDS, ids=str)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Path]:
    """A tokenizer and its file."""
    tokenizer = KINDS[request.param]()
    path = tmp_path_factory.mktemp(request.param) / "tokenizer.json"
    tokenizer.save(str(path))
    return tokenizer, path


def tokenize(tessera: Path, path: Path, text: bytes, *options: str) -> tuple[list[int], str, float]:
    """Ids, the text they decode to, and the milliseconds of encoding."""
    prompt = path.parent / "prompt"
    prompt.write_bytes(text)
    done = subprocess.run([tessera, "tokenize", "--model", path, "--prompt", prompt, "--json", *options],
                          capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    return report["tokens"], bytes(report["decoded_bytes"]).decode("utf-8", "replace"), report["milliseconds"]


def check(tessera: Path, trained: tuple[Tokenizer, Path], text: str) -> None:
    tokenizer, path = trained
    expected = tokenizer.encode(text, add_special_tokens=False)
    ids, decoded, _ = tokenize(tessera, path, text.encode(), "--special")
    assert ids == expected.ids, repr(text[:200])
    assert decoded == tokenizer.decode(expected.ids), repr(text[:200])


def test_corpus(tessera: Path, trained: tuple[Tokenizer, Path]) -> None:
    """Ids and decoded text of code, prose, scripts, marks, spaces, names of special tokens and long words."""
    for text in CORPUS:
        check(tessera, trained, text)


def test_random(tessera: Path, trained: tuple[Tokenizer, Path]) -> None:
    """Texts of characters that rarely meet; one by one where they differ together."""
    texts = random_texts(150)
    for first in range(0, len(texts), 25):
        check(tessera, trained, "\n".join(texts[first:first + 25]))


def test_names_of_special_tokens_are_text(tessera: Path, trained: tuple[Tokenizer, Path]) -> None:
    """Unless they are asked for."""
    tokenizer, path = trained
    tokenizer.encode_special_tokens = True
    try:
        text = "x<|begin|>y <s>z</s> <tool>"
        ids, _, _ = tokenize(tessera, path, text.encode())
        assert ids == tokenizer.encode(text, add_special_tokens=False).ids
    finally:
        tokenizer.encode_special_tokens = False


def test_invalid_utf8(tessera: Path, trained: tuple[Tokenizer, Path]) -> None:
    """Ill-formed parts become U+FFFD, as Python's decoding does it."""
    tokenizer, path = trained
    generator = random.Random(3)
    for _ in range(8):
        data = bytearray((PROSE + OTHER)[:400].encode())
        for _ in range(30):
            data[generator.randrange(len(data))] = generator.randrange(256)
        ids, _, _ = tokenize(tessera, path, bytes(data), "--special")
        assert ids == tokenizer.encode(data.decode("utf-8", "replace"), add_special_tokens=False).ids


def test_megabytes(tessera: Path, trained: tuple[Tokenizer, Path]) -> None:
    """A megabyte of text, and one word of a megabyte, which quadratic time would not finish."""
    tokenizer, path = trained
    for text in [(PROSE + CODE + OTHER) * 700, "ab" * 500_000]:
        ids, _, milliseconds = tokenize(tessera, path, text.encode())
        assert ids == tokenizer.encode(text, add_special_tokens=False).ids
        assert milliseconds < 60_000


def test_accents(tessera: Path, tmp_path: Path) -> None:
    """Marks go. The package's table of them is older than ours: only marks that both know."""
    tokenizer = with_word_options()
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(),
                                                 normalizers.Lowercase()])
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    for text in [MARKS, PROSE, OTHER]:
        check(tessera, (tokenizer, path), text)
