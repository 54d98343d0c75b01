# SPDX-License-Identifier: Apache-2.0
"""Generated recall tasks. Each generator returns one row: tokens and the mask of the tokens that are answers."""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from corpus import TextSampler
from model import BOS

LOWER = string.ascii_lowercase
FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. ",
    "Nothing of note happened on this day, and nothing was written down. ",
    "One line follows another line, and the page is long. ",
)
NAMES = ("secret word", "magic number", "access code", "door code", "safe number", "project name", "call sign",
         "lost item", "user name", "room number")


def mark(name: str) -> str:
    """The mark before a planted value: `PK#` for the pass key."""
    return "".join(word[0] for word in name.split()).upper() + "#"


@dataclass
class Row:
    """Tokens of one sequence, the tokens that are answers (recallable from the context), and those not to learn."""

    tokens: np.ndarray
    answer: np.ndarray
    noise: np.ndarray


class Builder:
    """Collects bytes together with what each of them is for."""

    TEXT, ANSWER, NOISE = 0, 1, 2

    def __init__(self) -> None:
        self.tokens: list[np.ndarray] = [np.array([BOS])]
        self.kinds: list[np.ndarray] = [np.array([self.NOISE])]
        self.size = 1

    def add(self, data: bytes | str | np.ndarray, kind: int = 0) -> None:
        """Append bytes of one kind."""
        if isinstance(data, str):
            data = data.encode()
        part = np.frombuffer(data, dtype=np.uint8).astype(np.int64) if isinstance(data, bytes) else data
        self.tokens.append(part)
        self.kinds.append(np.full(len(part), kind))
        self.size += len(part)

    def row(self, length: int) -> Row:
        """The row, cut to `length`."""
        tokens = np.concatenate(self.tokens)[:length]
        kinds = np.concatenate(self.kinds)[:length]
        assert len(tokens) == length, (len(tokens), length)
        return Row(tokens, kinds == self.ANSWER, kinds == self.NOISE)


class Tasks:
    """The generators; everything random comes from the generator that is passed in."""

    def __init__(self, text: TextSampler, words: list[bytes]) -> None:
        self.text = text
        self.words = [w.decode() for w in words]

    # -- pieces ---------------------------------------------------------------------------------------------------

    def letters(self, rng: np.random.Generator, alphabet: str, low: int, high: int) -> str:
        """A random string of low..high characters."""
        return "".join(alphabet[i] for i in rng.integers(0, len(alphabet), int(rng.integers(low, high + 1))))

    def value(self, rng: np.random.Generator) -> str:
        """A value to recall: mostly digits, also letters, words and mixtures."""
        u = rng.random()
        if u < 0.5:
            return self.letters(rng, string.digits, 3, 7)
        if u < 0.7:
            return self.letters(rng, LOWER, 3, 8)
        if u < 0.9:
            return self.words[int(rng.integers(len(self.words)))]
        return self.letters(rng, LOWER + string.ascii_uppercase + string.digits, 4, 8)

    def hay(self, rng: np.random.Generator, length: int, real: bool | None = None) -> tuple[np.ndarray, int]:
        """Hay of a length, and its kind: real text (mostly), repeated filler sentences, or random words."""
        if length <= 0:
            return np.empty(0, dtype=np.int64), Builder.TEXT
        u = rng.random()
        if real or (real is None and u < 0.75):
            return self.text.plain(rng, length), Builder.TEXT
        if real is False or u < 0.88:
            sentence = FILLER[int(rng.integers(len(FILLER)))]
            data = (sentence * (length // len(sentence) + 1))[:length]
            return np.frombuffer(data.encode(), dtype=np.uint8).astype(np.int64), Builder.TEXT
        picks = rng.integers(0, len(self.words), length // 4 + 1)
        data = " ".join(self.words[i] for i in picks)
        data = (data * (length // len(data) + 1))[:length]
        return np.frombuffer(data.encode(), dtype=np.uint8).astype(np.int64), Builder.NOISE

    # -- tasks ----------------------------------------------------------------------------------------------------

    def repeat(self, rng: np.random.Generator, length: int) -> Row:
        """A random string, and then again and again: everything after the first character of a repeat is an answer."""
        b = Builder()
        alphabet = (string.digits, LOWER, LOWER + string.digits, "".join(map(chr, range(33, 127))))[rng.integers(4)]
        period = int(rng.integers(12, max(13, min(length // 2, 400))))
        if rng.random() < 0.25:
            unit = self.text.plain(rng, period)
            first = Builder.TEXT
        else:
            unit = np.frombuffer(self.letters(rng, alphabet, period, period).encode(), dtype=np.uint8).astype(np.int64)
            first = Builder.NOISE
        b.add(unit, first)
        while b.size < length:
            b.add(unit[:1], Builder.NOISE)
            b.add(unit[1:], Builder.ANSWER)
        return b.row(length)

    def quote(self, rng: np.random.Generator, length: int) -> Row:
        """Hay in which passages that stood in it earlier stand again, from their middle on recallable."""
        b = Builder()
        size = int(rng.integers(24, max(25, min(200, length // 8))))
        hay, kind = self.hay(rng, length)
        at = length // 3
        b.add(hay[:at], kind)
        while b.size < length:
            start = int(rng.integers(0, max(1, at - size)))
            passage = hay[start : start + size]
            b.add("\n> ", Builder.NOISE)
            b.add(passage[:12], Builder.NOISE)
            b.add(passage[12:], Builder.ANSWER)
        return b.row(length)

    def key_value(self, rng: np.random.Generator, length: int, in_hay: bool | None = None) -> Row:
        """Lines `key = value`, then the same keys again in random order: the values of the second part are answers."""
        b = Builder()
        sep = (" = ", ": ", "=", " -> ")[rng.integers(4)]
        alphabet = (LOWER, LOWER + string.digits)[rng.integers(2)]
        if in_hay is None:
            in_hay = length >= 512 and rng.random() < 0.5
        query_bytes = min(length // 2, 2048) if in_hay else length // 2
        wanted = min(query_bytes // 14, 64) if in_hay else length
        pairs: dict[str, str] = {}
        used = 0
        while len(pairs) < wanted and used < length - query_bytes - 32:
            key = self.letters(rng, alphabet, 3, 6) if rng.random() < 0.7 else self.words[rng.integers(len(self.words))]
            if key in pairs:
                continue
            pairs[key] = self.value(rng)
            used += len(key) + len(sep) + len(pairs[key]) + 1
        spare = max(0, length - query_bytes - used - 8) if in_hay else 0
        hay, kind = self.hay(rng, spare)
        cuts = np.sort(rng.integers(0, spare + 1, len(pairs)))
        at = 0
        for (key, value), cut in zip(pairs.items(), cuts, strict=True):
            if cut > at:
                b.add(hay[at:cut], kind)
                b.add("\n", Builder.NOISE)
                at = int(cut)
            b.add(key + sep + value + "\n", Builder.NOISE)
        b.add(hay[at:], kind)
        b.add("\n", Builder.NOISE)
        keys = list(pairs)
        while b.size < length:
            for i in rng.permutation(len(keys)):
                b.add(keys[i] + sep, Builder.NOISE)
                b.add(pairs[keys[i]] + "\n", Builder.ANSWER)
        return b.row(length)

    def passkey(
        self,
        rng: np.random.Generator,
        length: int,
        others: int | None = None,
        depth: float | None = None,
        real: bool | None = None,
        digits: bool = False,
    ) -> Row:
        """A pass key planted in hay and asked for at the end; `others` more needles of other names, asked for too.

        Planted: `\\nThe pass key is PK#48213. Remember it. PK#48213 is the pass key.\\n`
        Asked:   `\\nWhat is the pass key? The pass key is PK#` -> `48213.`

        The mark before the key (the initials of the name) is what a model of a few layers finds the place by.
        """
        if others is None:
            others = int(rng.integers(0, max(1, min(11, length // 160))))
        names = ["pass key", *(NAMES[i] for i in rng.permutation(len(NAMES))[:others])]
        values = [self.letters(rng, string.digits, 5, 5) if digits else self.value(rng) for _ in names]
        marks = [mark(n) for n in names]
        ends = [(f"\nWhat is the {n}? The {n} is {m}", f"{v}.") for n, m, v in zip(names, marks, values, strict=True)]
        needles = [(f"\nThe {n} is {m}{v}. Remember it. {m}", v, f" is the {n}.\n")
                   for n, m, v in zip(names, marks, values, strict=True)]
        spare = length - 1 - sum(len(q) + len(a) for q, a in ends) - sum(sum(map(len, n)) for n in needles)
        if spare < 0:
            return self.passkey(rng, length, others=0, depth=depth, real=real, digits=True)
        hay, kind = self.hay(rng, spare, real)
        if depth is None:
            cuts = np.sort(rng.integers(0, spare + 1, len(names)))
        else:
            cuts = np.full(len(names), int(depth * spare))
        b = Builder()
        at = 0
        for i, cut in zip(rng.permutation(len(names)), cuts, strict=True):
            b.add(hay[at:cut], kind)
            at = int(cut)
            lead, value, tail = needles[i]
            b.add(lead, Builder.NOISE)
            b.add(value, Builder.ANSWER)
            b.add(tail, Builder.TEXT)
        b.add(hay[at:], kind)
        for i in rng.permutation(len(names)):
            question, answer = ends[i]
            b.add(question, Builder.TEXT)
            b.add(answer, Builder.ANSWER)
        return b.row(length)

    def plain_text(self, rng: np.random.Generator, length: int) -> Row:
        """A window of text after <bos>."""
        b = Builder()
        b.add(self.text.window(rng, length - 1), Builder.TEXT)
        return b.row(length)

    def generators(self) -> dict[str, Callable[[np.random.Generator, int], Row]]:
        """The generators by the names that the stages of the recipe use."""
        return {"text": self.plain_text, "repeat": self.repeat, "quote": self.quote,
                "kv": self.key_value, "passkey": self.passkey}


def skipped_positions(rng: np.random.Generator, length: int, limit: int) -> np.ndarray:
    """Positions 0..limit-1 with a few random jumps: short rows that show the model long distances.

    Also known as positional skip-wise training: between jumps the positions run on by one.
    """
    room = limit - length
    if room <= 0:
        return np.arange(length)
    jumps = int(rng.integers(1, 5))
    total = int(room * rng.random())
    shares = np.sort(rng.integers(0, total + 1, jumps))
    places = np.sort(rng.integers(1, length, jumps))
    steps = np.zeros(length, dtype=np.int64)
    np.add.at(steps, places, np.diff(shares, prepend=0))
    return np.arange(length) + np.cumsum(steps)
