"""Language models: load, generate, stream, evaluate."""

from __future__ import annotations

import codecs
import html
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from . import _core
from ._core import Error
from ._methods import Method, as_method
from ._plan import Plan


class Generation(NamedTuple):
    """What `Model.generate` returns."""

    text: str
    """Bytes that are no UTF-8 are shown as U+FFFD."""
    tokens: list[int]
    data: bytes
    """The text as the model wrote it."""
    statistics: dict[str, Any]
    """Times in ms, tokens, density of prefill, bytes of the cache."""
    bits_per_byte: float | None
    """Teacher-forced code length of the prompt, where it was asked for."""

    def _repr_html_(self) -> str:
        s = self.statistics
        return (
            f"<pre>{html.escape(self.text)}</pre><small>{s['prefill_tokens']} tokens in {s['prefill_ms']:.0f} ms, density "
            f"{s['density']:.3f}; {len(self.tokens)} new in {s['decode_ms']:.0f} ms; cache {s['cache_bytes'] / 1e6:.1f} MB"
            "</small>"
        )


class Score(NamedTuple):
    """A mean with its 95 % confidence interval."""

    mean: float
    low: float
    high: float


class Evaluation(NamedTuple):
    """A method on a task at a length."""

    task: str
    length: int
    method: str
    samples: int
    score: Score
    difference: Score | None
    """To dense attention on the same samples, where that was among the methods."""
    gold_bits: float | None
    density: float
    """Of prefill."""
    decode_density: float
    """Of decoding; 0 in the phase prefill, where it is not counted."""
    prefill_ms: float
    decode_ms: float
    cache_mb: float


class EvaluationTable(list[Evaluation]):
    """Rows of `Model.evaluate`, shown as a table in notebooks."""

    def _repr_html_(self) -> str:
        head = "<tr><th>task</th><th>tokens</th><th>method</th><th>score</th><th>95 %</th><th>density</th></tr>"
        rows = "".join(
            f"<tr><td>{r.task}</td><td>{r.length}</td><td>{html.escape(r.method)}</td><td>{r.score.mean:.3f}</td>"
            f"<td>{r.score.low:.3f} to {r.score.high:.3f}</td><td>{r.density:.3f}</td></tr>"
            for r in self
        )
        return f"<table>{head}{rows}</table>"


def _handle(method: str | Method | None) -> _core.Method | None:
    return None if method is None else as_method(method)._handle


class Session:
    """One sequence in a model. Calls from several threads take turns; `cancel` ends the one that runs."""

    def __init__(
        self,
        model: Model,
        method: str | Method | None = None,
        decode_method: str | Method | None = None,
        *,
        kv_dtype: str = "f32",
        chunk: int | None = None,
        capacity: int = 0,
        threads: int = 0,
        isa: str | None = None,
        on_plan: Callable[[int, Plan], None] | None = None,
    ) -> None:
        """
        Args:
            method: of prefill, and of decoding if it supports that; None: dense.
            decode_method: of decoding; owns the cache.
            kv_dtype: "f32", "bf16", "f16" or "i8", in the cache.
            chunk: tokens per prefill chunk; 0: the whole prompt; None: those whose activations fit in
                48 MiB, in 1 GiB if the method needs the whole prompt.
            capacity: longest sequence; 0: that of the model.
            on_plan: receives (layer, plan) of everything that prefill ran.
        """
        self.model = model
        receive = None if on_plan is None else (lambda layer, native: on_plan(layer, Plan(native)))
        options = _core.CallOptions("automatic", isa or "", threads)
        self._native = _core.Session(
            model._native, _handle(method), _handle(decode_method), kv_dtype, chunk, capacity, options, receive
        )

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        """Appends tokens; returns the logits after the last one, float32 [vocab_size]."""
        return self._native.prefill(_tokens(tokens))

    def decode(self, token: int) -> np.ndarray:
        """Appends one token with the decode method; returns the logits, float32 [vocab_size]."""
        return self._native.decode(int(token))

    def reset(self) -> None:
        """Forgets the sequence."""
        self._native.reset()

    def cancel(self) -> None:
        """Ends the call that another thread runs, with an Error there."""
        self._native.cancel()

    @property
    def tokens(self) -> int:
        """Tokens of the sequence, whether or not the cache still holds them."""
        return self._native.tokens

    @property
    def capacity(self) -> int:
        return self._native.capacity

    @property
    def statistics(self) -> dict[str, Any]:
        """Times in ms, tokens, density of prefill, bytes of the cache."""
        return self._native.statistics

    def generate(
        self,
        prompt: str | bytes | Sequence[int],
        max_tokens: int = 128,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_at_eos: bool = True,
        bits_per_byte: bool = False,
        on_text: Callable[[bytes], Any] | None = None,
    ) -> Generation:
        """Prefills the prompt and generates. `on_text` receives the bytes of each new token."""
        tokens = self.model._prompt(prompt)
        result = self._native.generate(
            tokens, max_tokens, temperature, top_p, seed, stop_at_eos, bits_per_byte, on_text
        )
        data = result["text"]
        return Generation(
            data.decode("utf-8", "replace"), result["tokens"], data, self.statistics, result["bits_per_byte"]
        )

    def stream(self, prompt: str | bytes | Sequence[int], max_tokens: int = 128, **options: Any) -> Iterator[str]:
        """The new text piece by piece, as it comes. Leaving the loop early ends the generation."""
        tokens = self.model._prompt(prompt)
        pieces: queue.Queue[bytes | BaseException | None] = queue.Queue()

        def work() -> None:
            try:
                self.generate(tokens, max_tokens, on_text=pieces.put, **options)
                pieces.put(None)
            except BaseException as error:  # noqa: BLE001: raised again where the text is read
                pieces.put(error)

        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                if text := decoder.decode(piece):
                    yield text
            if text := decoder.decode(b"", True):
                yield text
        finally:
            while thread.is_alive():  # a cancel before the call began is forgotten by it
                self.cancel()
                thread.join(0.01)


def _tokens(tokens: Sequence[int]) -> list[int]:
    values = [int(token) for token in tokens]
    if not values:
        raise Error("tokens are empty; expected at least one")
    return values


class Model:
    """A language model of the Llama architecture: shape, weights, tokenizer. Immutable; sessions share it."""

    def __init__(self, native: _core.Model) -> None:
        if not isinstance(native, _core.Model):
            raise TypeError("models are made by tessera.Model.load")
        self._native = native

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, threads: int = 0, weights: str = "auto") -> Model:
        """Reads config.json, *.safetensors and tokenizer.json of a folder, or a *.gguf file. Raises Error naming file and key.

        Args:
            folder: of the model, or the file.
            threads: that copy weights; 0: all.
            weights: "mapped" (pages of the files), "copied" (memory of the process, in huge pages where the system gives
                them: decoding is faster) or "auto": copied if the files take at most half of the memory available.
        """
        return cls(_core.Model.load(os.fspath(folder), threads, weights))

    @property
    def config(self) -> dict[str, Any]:
        """Sizes and constants, from config.json."""
        return self._native.config

    def encode(self, text: str | bytes, with_bos: bool = True) -> list[int]:
        """Token ids of a text, preceded by the beginning-of-sequence token if the model has one and it is wanted."""
        return self._native.encode(text.encode() if isinstance(text, str) else text, with_bos)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; bytes that are no UTF-8 become U+FFFD."""
        return self._native.decode([int(token) for token in tokens]).decode("utf-8", "replace")

    def session(self, method: str | Method | None = None, decode_method: str | Method | None = None, **options: Any) -> Session:
        """A new sequence; see `Session`."""
        return Session(self, method, decode_method, **options)

    def generate(
        self,
        prompt: str | bytes | Sequence[int],
        max_tokens: int = 128,
        *,
        method: str | Method | None = None,
        decode_method: str | Method | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_at_eos: bool = True,
        bits_per_byte: bool = False,
        **options: Any,
    ) -> Generation:
        """Generates after a prompt, in a session of its own. Equal seeds give equal texts on every machine."""
        return self.session(method, decode_method, **options).generate(
            prompt,
            max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop_at_eos=stop_at_eos,
            bits_per_byte=bits_per_byte,
        )

    def stream(
        self,
        prompt: str | bytes | Sequence[int],
        max_tokens: int = 128,
        *,
        method: str | Method | None = None,
        decode_method: str | Method | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """The new text piece by piece; `options` are those of `Session.generate`."""
        return self.session(method, decode_method).stream(prompt, max_tokens, **options)

    def plans(self, prompt: str | bytes | Sequence[int], method: str | Method) -> list[Plan]:
        """The plan of each layer for a prompt, to look at."""
        found: dict[int, Plan] = {}
        session = self.session(method, chunk=0, on_plan=lambda layer, plan: found.__setitem__(layer, plan))
        session.prefill(self._prompt(prompt))
        return [found[layer] for layer in sorted(found)]

    def evaluate(
        self,
        tasks: Sequence[str] = ("passkey",),
        lengths: Sequence[int] = (2048,),
        methods: Sequence[str] = ("dense",),
        *,
        phase: str = "prefill",
        samples: int = 10,
        seed: int = 0,
    ) -> EvaluationTable:
        """Scores of methods on generated tasks (`tessera.tasks()`), from 0 to 1.

        phase: where a method replaces dense attention: "prefill", "decode" or "both".
        """
        rows = _core.evaluate(self._native, list(tasks), list(lengths), list(methods), phase, samples, seed)
        return EvaluationTable(
            Evaluation(
                **row
                | {"score": Score(*row["score"]), "difference": row["difference"] and Score(*row["difference"])}
            )
            for row in rows
        )

    def _prompt(self, prompt: str | bytes | Sequence[int]) -> list[int]:
        return self.encode(prompt) if isinstance(prompt, (str, bytes)) else _tokens(prompt)

    def __repr__(self) -> str:
        c = self.config
        return (
            f"tessera.Model({c['layers']} layers, {c['q_heads']} / {c['kv_heads']} heads of {c['head_dim']}, vocabulary "
            f"{c['vocab_size']})"
        )


def tasks() -> dict[str, str]:
    """Generated tasks of `Model.evaluate`, with a summary."""
    return dict(_core.tasks())
