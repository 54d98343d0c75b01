"""Methods of the registry, with their parameters."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any, Literal

from . import _core
from ._core import Error, State

Value = bool | int | float | str


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One declared parameter of a method."""

    name: str
    type: Literal["int", "float", "bool", "choice", "string"]
    default: Value
    minimum: float | None
    maximum: float | None
    choices: tuple[str, ...]
    description: str


@dataclasses.dataclass(frozen=True)
class SideInput:
    """A tensor that a method reads beside q, k, v (`side={name: array}`)."""

    name: str
    shape: str
    """For people: "[B, Hq, N, D]"; missing leading axes are 1."""
    minimum: float
    maximum: float
    required: bool
    description: str


@dataclasses.dataclass(frozen=True)
class MethodInfo:
    """One row of the registry."""

    name: str
    family: str
    summary: str
    paper: str
    """Title and arXiv id; empty for plain patterns."""
    phases: tuple[str, ...]
    """Of "prefill", "decode", "backward"."""
    causal: bool
    bidirectional: bool
    variable_length: bool
    budget: tuple[str, float, float] | None
    """Parameter that trades quality for cost, its sparsest and its densest value."""
    side_inputs: tuple[SideInput, ...]
    has_plan: bool
    """False: a recurrence."""
    own_cache: bool
    """Keeps keys and values its own way in `tessera.Model`."""
    parameters: tuple[Parameter, ...]

    def _repr_html_(self) -> str:
        import html

        rows = "".join(
            f"<tr><td><code>{p.name}</code></td><td>{html.escape(str(p.default))}</td><td>{html.escape(p.description)}</td></tr>"
            for p in self.parameters
        )
        return (
            f"<b>{self.name}</b> ({self.family}; {', '.join(self.phases)})<br>{html.escape(self.summary)}<br>"
            f"<i>{html.escape(self.paper)}</i>"
            f"<table><tr><th>parameter</th><th>default</th><th></th></tr>{rows}</table>"
        )


def _value(kind: str, text: str) -> Value:
    if kind == "bool":
        return text == "true"
    if kind == "int":
        return int(text)
    return float(text) if kind == "float" else text


def _parameter(row: dict[str, Any]) -> Parameter:
    return Parameter(
        name=row["name"],
        type=row["type"],
        default=_value(row["type"], row["default"]),
        minimum=float(row["minimum"]) if row["minimum"] else None,
        maximum=float(row["maximum"]) if row["maximum"] else None,
        choices=tuple(row["choices"]),
        description=row["description"],
    )


def _info(row: dict[str, Any]) -> MethodInfo:
    return MethodInfo(
        **{key: row[key] for key in ("name", "family", "summary", "paper", "causal", "bidirectional")},
        variable_length=row["variable_length"],
        phases=tuple(row["phases"]),
        budget=row["budget"],
        side_inputs=tuple(SideInput(**side) for side in row["side_inputs"]),
        has_plan=row["has_plan"],
        own_cache=row["own_cache"],
        parameters=tuple(_parameter(parameter) for parameter in row.get("parameters", ())),
    )


@functools.cache
def methods() -> dict[str, MethodInfo]:
    """Every method of the registry by name, sorted by family and name."""
    return {row["name"]: _info(row) for row in _core.methods()}


class Method:
    """A method with its parameters; immutable and safe to share between threads.

    `spec` is a name, "name:key=value,key=value" or the path of a JSON file, which may give each layer its own method.
    Keyword arguments are further parameters. Raises Error with the nearest name for an unknown name or key, and with
    the range for a value outside of it.
    """

    __slots__ = ("_handle", "_info", "description", "__weakref__")

    description: str
    """Everything about it as text: name and parameters, or the path of a file with a method per layer."""

    def __init__(self, spec: str, /, **parameters: Value) -> None:
        self._set(_bind(spec, parameters), spec)

    def _set(self, handle: _core.Method, spec: str) -> None:
        self._handle = handle
        self._info: MethodInfo | None = None
        name = handle.info["name"]
        self.description = f"{name}|{handle.parameters}" if name in methods() else spec

    @property
    def info(self) -> MethodInfo:
        """Its row of the registry, without parameters for a file with one method per layer."""
        if self._info is None:
            row = self._handle.info
            self._info = methods().get(row["name"]) or _info(row)
        return self._info

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def parameters(self) -> dict[str, Any]:
        """All parameters, defaults filled in."""
        return json.loads(self._handle.parameters)

    @property
    def runs_its_plan(self) -> bool:
        """Whether its attention is its plan alone, without branches or corrections."""
        return self._handle.runs_its_plan

    def new_state(self) -> State | None:
        """State that lives across calls (earlier plans, histories), for `state=`; None for methods without."""
        return self._handle.new_state()

    def __repr__(self) -> str:
        given = methods()[self.name].parameters if self.name in methods() else ()
        defaults = {parameter.name: parameter.default for parameter in given}
        changed = [f", {key}={value!r}" for key, value in self.parameters.items() if defaults.get(key) != value]
        return f"tessera.Method({self.name!r}{''.join(changed) if given else ''})"

    def __reduce__(self) -> tuple[Any, ...]:
        return (from_description, (self.description,))


def from_description(description: str) -> Method:
    """Inverse of `Method.description`."""
    name, separator, parameters = description.partition("|")
    if not separator:
        return Method(description)
    method = Method.__new__(Method)
    method._set(_core.Method.with_parameters(name, parameters), name)
    return method


def _bind(spec: str, parameters: dict[str, Value]) -> _core.Method:
    if not isinstance(spec, str):
        raise Error(f"method is of type {type(spec).__name__}; expected a name, name:key=value, a file or a tessera.Method")
    handle = _core.Method(spec)
    if not parameters:
        return handle
    name = handle.info["name"]
    if name not in methods():
        raise Error(f"method {spec!r} is a file with a method per layer; parameters {sorted(parameters)} belong into it")
    merged = json.loads(handle.parameters) | parameters
    return _core.Method.with_parameters(name, json.dumps(merged, default=_plain))


def _plain(value: Any) -> Any:
    """Numbers of NumPy as numbers of JSON."""
    if hasattr(value, "item"):
        return value.item()
    raise Error(f"a parameter is of type {type(value).__name__}; expected a number, a truth value or text")


@functools.lru_cache(maxsize=256)
def _cached(spec: str) -> Method:
    return Method(spec)


def as_method(method: str | Method, parameters: dict[str, Value] | None = None) -> Method:
    """The method that an argument `method=` names; files are read anew."""
    if isinstance(method, Method):
        if parameters:
            return Method(method.name, **(method.parameters | parameters))
        return method
    if parameters or not isinstance(method, str) or "/" in method or method.endswith(".json"):
        return Method(method, **(parameters or {}))
    return _cached(method)
