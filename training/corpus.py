# SPDX-License-Identifier: Apache-2.0
"""The text of the embedded model: files that ship with a Debian system and its Python; nothing is downloaded."""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model import BOS, EOS

MIB = 1 << 20


@dataclass(frozen=True)
class Source:
    """A family of files: where they are, the terms they come under, and how many bytes of them are taken."""

    name: str
    licence: str
    root: str
    patterns: tuple[str, ...]
    cap: int


SOURCES: tuple[Source, ...] = (
    Source("licences", "verbatim copying permitted", "/usr/share/common-licenses", ("*",), 1 * MIB),
    Source("package-docs", "each package's own free licence (Debian main)", "/usr/share/doc",
           ("*/copyright", "*/README*", "*/NEWS*", "*/FAQ*", "*/AUTHORS*"), 5 * MIB),
    Source("git-docs", "GPL-2.0", "/usr/share/doc/git", ("**/*.txt", "**/*.txt.gz", "**/*.adoc"), 2 * MIB),
    Source("gdb-and-gcc-docs", "GPL-3.0 and GFDL-1.3", "/usr/share/doc", ("gdb/*", "gcc-12-base/**/*"), 1 * MIB),
    Source("info-manuals", "GFDL, GPL", "/usr/share/info", ("*.info*",), 4 * MIB),
    Source("manual-pages", "each project's own free licence (Debian main)", "/usr/share/man",
           ("man1/*.gz", "man2/*.gz", "man3/*.gz", "man5/*.gz", "man7/*.gz", "man8/*.gz"), 5 * MIB),
    Source("python-library", "PSF-2.0", "/usr/lib/python3.11", ("**/*.py",), 6 * MIB),
    Source("perl-library", "Artistic-1.0 or GPL-1.0+", "/usr/share/perl", ("**/*.pod", "**/*.pm"), 4 * MIB),
    Source("c-headers", "LGPL-2.1+, GPL-2.0 with the syscall note, GPL-3.0 with the runtime exception",
           "/usr/include", ("*.h", "linux/*.h", "*-linux-gnu/sys/*.h", "*-linux-gnu/bits/*.h", "c++/*/bits/*.h"),
           3 * MIB),
)

# Documents that are always held out (a demonstration may use them as unseen text).
ALWAYS_HELD_OUT = frozenset({"GPL-3", "Apache-2.0", "GFDL-1.3"})


@dataclass
class Corpus:
    """Training and held-out documents as bytes, and what was taken from each source."""

    train: list[bytes]
    held_out: list[bytes]
    manifest: dict[str, dict[str, object]]
    fingerprint: str
    words: list[bytes]


def _read(path: Path) -> bytes | None:
    """The UTF-8 text of a file, unpacked; None where it is no text."""
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        data.decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError, gzip.BadGzipFile):
        return None
    if len(data) < 256 or b"\0" in data:
        return None
    return data


def load_corpus(sources: tuple[Source, ...] = SOURCES) -> Corpus:
    """Read every source in a fixed order; drop copies; hold out about 3% of the files by the hash of their name."""
    train: list[bytes] = []
    held_out: list[bytes] = []
    manifest: dict[str, dict[str, object]] = {}
    seen: set[bytes] = set()
    whole = hashlib.sha256()
    for source in sources:
        root = Path(source.root)
        paths = {p for pattern in source.patterns for p in root.glob(pattern) if p.is_file() and not p.is_symlink()}
        # In the order of the hash of the name: the cap then takes an even sample of the family.
        order = sorted(paths, key=lambda p: hashlib.sha256(str(p.relative_to(root)).encode()).digest())
        taken = files = held = 0
        for path in order:
            if taken >= source.cap:
                break
            data = _read(path)
            if data is None:
                continue
            data = data[: source.cap // 8]
            digest = hashlib.sha256(data).digest()
            if digest in seen:
                continue
            seen.add(digest)
            whole.update(digest)
            name = hashlib.sha256(("held-out " + str(path.relative_to(root))).encode()).digest()
            if name[0] < 8 or (source.name == "licences" and path.name in ALWAYS_HELD_OUT):
                held_out.append(data)
                held += len(data)
            else:
                train.append(data)
                taken += len(data)
                files += 1
        manifest[source.name] = {"licence": source.licence, "root": source.root, "files": files,
                                 "train_bytes": taken, "held_out_bytes": held}
    if not train or not held_out:
        raise SystemExit("no text found: the sources listed in training/corpus.py are missing on this system")
    counts: dict[bytes, int] = {}
    for data in train[:: max(1, len(train) // 400)]:
        for word in data.split():
            if 3 <= len(word) <= 9 and word.isalpha() and word.islower() and word.isascii():
                counts[word] = counts.get(word, 0) + 1
    words = sorted(w for w, n in counts.items() if n >= 2)
    return Corpus(train, held_out, manifest, whole.hexdigest(), words)


class TextSampler:
    """Windows of text: whole documents packed one after another, each as <bos> text <eos>."""

    def __init__(self, documents: list[bytes], seed: int) -> None:
        order = np.random.default_rng(seed).permutation(len(documents))
        size = sum(len(d) + 2 for d in documents)
        self.stream = np.empty(size, dtype=np.int16)
        at = 0
        for i in order:
            data = np.frombuffer(documents[i], dtype=np.uint8)
            self.stream[at] = BOS
            self.stream[at + 1 : at + 1 + len(data)] = data
            self.stream[at + 1 + len(data)] = EOS
            at += len(data) + 2

    def window(self, rng: np.random.Generator, length: int) -> np.ndarray:
        """`length` consecutive tokens from a random place, cut at no particular boundary."""
        start = int(rng.integers(0, len(self.stream) - length))
        return self.stream[start : start + length].astype(np.int64)

    def plain(self, rng: np.random.Generator, length: int) -> np.ndarray:
        """As `window`, with the document boundaries replaced by newlines: hay for the recall tasks."""
        tokens = self.window(rng, length)
        tokens[tokens >= BOS] = 10
        return tokens
