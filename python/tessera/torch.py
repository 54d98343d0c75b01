"""Attention as registered operators of PyTorch, with gradients, and modules.

`tessera.attention` and `tessera.run` come here by themselves for tensors that require gradients and under
`torch.compile`. The operators are `torch.ops.tessera.attention`, `attention_backward`, `run_plan`, `run_plan_backward`;
all have fake kernels, so that `torch.compile` and `torch.export` see shapes and strides without running anything.

Selections are constants of the backward pass. Where a method computes a plan, its backward pass plans again, which
costs less than to keep the plan and gives the same one.
"""

from __future__ import annotations

import functools
import json
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import _core
from ._arrays import bhnd, check_layout
from ._core import Error
from ._functional import Grid, _options, _problem, as_grid, make_inputs
from ._methods import Method, Value, as_method, from_description
from ._plan import Plan

# --- descriptions that fit the schema of an operator --------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def _method_of(description: str) -> _core.Method:
    return from_description(description)._handle


@torch.compiler.assume_constant_result
def _with_parameters(spec: str, parameters: tuple[tuple[str, Value], ...]) -> str:
    return as_method(from_description(spec) if "|" in spec else spec, dict(parameters)).description


def _description(method: str | Method, parameters: dict[str, Value]) -> str:
    """A method as text; compilers see a constant."""
    if isinstance(method, str):
        return _with_parameters(method, tuple(parameters.items()))
    if not isinstance(method, Method):
        raise Error(f"method is of type {type(method).__name__}; expected a name, name:key=value, a file or a tessera.Method")
    return _with_parameters(method.description, tuple(parameters.items())) if parameters else method.description


_PLANS: weakref.WeakValueDictionary[int, Plan] = weakref.WeakValueDictionary()


def _number_of(plan: Plan) -> int:
    number = id(plan._native)
    _PLANS[number] = plan
    return number


def _plan_of(number: int) -> Plan:
    plan = _PLANS.get(number)
    if plan is None:
        raise Error(f"plan {number} is gone; keep the tessera.Plan as long as its operators run")
    return plan


def _rows(x: Tensor) -> Tensor:
    """With neighbouring elements in a row; a copy only where they are not."""
    x = x.detach()
    return x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()


def _empty_results(q: Tensor, v: Tensor, tokens_first: bool) -> tuple[Tensor, Tensor]:
    """An output [B, Hq, Nq, Dv] in the order of axes that the caller has, and a log-sum-exp [B, Hq, Nq]."""
    batch, heads, tokens, _ = q.shape
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if tokens_first:
        return q.new_empty(batch, tokens, heads, v.shape[3]).transpose(1, 2), lse
    return q.new_empty(batch, heads, tokens, v.shape[3]), lse


def _problem_of(q: Tensor, k: Tensor, v: Tensor, call: str) -> _core.Problem:
    c = json.loads(call)
    grid = None if c["grid"] is None else _core.TokenGrid(c["grid"][:3], c["grid"][3], c["grid"][4])
    return _problem(q, k, v, c["causal"], c["scale"], c["q_offset"], c["cu_seqlens_q"], c["cu_seqlens_k"], grid)


@torch.compiler.assume_constant_result
def _call_text(
    causal: bool, scale: float | None, q_offset: int | None, cu_seqlens_q: Any, cu_seqlens_k: Any, grid: Grid | None
) -> str:
    """What a problem has beside shapes."""
    grid = as_grid(grid)
    lengths = [None if x is None else [int(i) for i in x] for x in (cu_seqlens_q, cu_seqlens_k)]
    return json.dumps(
        {
            "causal": bool(causal),
            "scale": None if scale is None else float(scale),
            "q_offset": q_offset,
            "cu_seqlens_q": lengths[0],
            "cu_seqlens_k": lengths[1],
            "grid": None if grid is None else [*grid.extent, grid.prefix, grid.suffix],
        }
    )


def _inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    side: Sequence[Tensor],
    side_names: str,
    sink_logits: Tensor | None,
    alibi_slopes: Tensor | None,
    key_bias: Tensor | None,
    softcap: float,
) -> _core.Inputs:
    names = side_names.split(",") if side_names else []
    return make_inputs(
        q,
        k,
        v,
        softcap=softcap,
        sink_logits=sink_logits,
        alibi_slopes=alibi_slopes,
        key_bias=key_bias,
        side=dict(zip(names, side, strict=True)),
    )


# --- attention by a method -----------------------------------------------------------------------------------------


@torch.library.custom_op("tessera::attention", mutates_args=(), device_types="cpu")
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    side: Sequence[Tensor],
    sink_logits: Tensor | None,
    alibi_slopes: Tensor | None,
    key_bias: Tensor | None,
    method: str,
    side_names: str,
    call: str,
    softcap: float,
    layer: int,
    n_layers: int,
    threads: int,
    tokens_first: bool,
) -> tuple[Tensor, Tensor]:
    q, k, v = _rows(q), _rows(k), _rows(v)
    problem = _problem_of(q, k, v, call)
    inputs = _inputs(q, k, v, side, side_names, sink_logits, alibi_slopes, key_bias, softcap)
    inputs.check(problem)
    o, lse = _empty_results(q, v, tokens_first)
    options = _options("automatic", None, threads, layer, n_layers)
    _method_of(method).attend(problem, inputs, o, lse, options, None, False)
    return o, lse


@_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    side: Sequence[Tensor],
    sink_logits: Tensor | None,
    alibi_slopes: Tensor | None,
    key_bias: Tensor | None,
    method: str,
    side_names: str,
    call: str,
    softcap: float,
    layer: int,
    n_layers: int,
    threads: int,
    tokens_first: bool,
) -> tuple[Tensor, Tensor]:
    return _empty_results(q, v, tokens_first)


@torch.library.custom_op("tessera::attention_backward", mutates_args=(), device_types="cpu")
def _attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    side: Sequence[Tensor],
    sink_logits: Tensor | None,
    alibi_slopes: Tensor | None,
    key_bias: Tensor | None,
    o: Tensor,
    lse: Tensor,
    d_o: Tensor,
    d_lse: Tensor | None,
    method: str,
    side_names: str,
    call: str,
    softcap: float,
    layer: int,
    n_layers: int,
    threads: int,
) -> list[Tensor]:
    """Gradients of q, k, v, then of the side tensors, the sink logits and the key bias that there are."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    problem = _problem_of(q, k, v, call)
    inputs = _inputs(q, k, v, side, side_names, sink_logits, alibi_slopes, key_bias, softcap)
    results = _empty_gradients(q, k, v, side, sink_logits, key_bias)
    wanted = _wanted(results, side_names, sink_logits, key_bias)
    _core.method_backward(
        _method_of(method),
        problem,
        inputs,
        *_saved(o, lse, d_o, d_lse),
        wanted,
        _options("automatic", None, threads, layer, n_layers),
        None,
        None,
    )
    return results


def _saved(o: Tensor, lse: Tensor, d_o: Tensor, d_lse: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What a backward pass reads of the forward pass and of the gradients that reached it."""
    return _rows(o), lse.detach(), _rows(d_o), None if d_lse is None else d_lse.detach().contiguous()


def _empty_gradients(
    q: Tensor, k: Tensor, v: Tensor, side: Sequence[Tensor], sink_logits: Tensor | None, key_bias: Tensor | None
) -> list[Tensor]:
    given = [x for x in (q, k, v, *side, sink_logits, key_bias) if x is not None]
    # Methods leave the gradients alone of side tensors that they do not learn through.
    return [torch.empty_like(x, memory_format=torch.contiguous_format) if i < 3 else x.new_zeros(x.shape) for i, x in enumerate(given)]


def _wanted(
    results: list[Tensor], side_names: str, sink_logits: Tensor | None, key_bias: Tensor | None
) -> _core.Gradients:
    names = side_names.split(",") if side_names else []
    rest = results[3 + len(names) :]
    return _core.Gradients(
        d_q=results[0],
        d_k=results[1],
        d_v=results[2],
        d_sink_logits=rest[0] if sink_logits is not None else None,
        d_key_bias=rest[-1].unsqueeze(-1) if key_bias is not None else None,
        side=dict(zip(names, results[3:], strict=False)),
    )


def _gradients_of_logits(
    others: list[Tensor], sink_logits: Tensor | None, key_bias: Tensor | None
) -> tuple[Tensor | None, None, Tensor | None]:
    """Of sink logits, ALiBi slopes (none) and key bias, from the end of `_empty_gradients`."""
    return others[0] if sink_logits is not None else None, None, others[-1] if key_bias is not None else None


@_attention_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, side: Sequence[Tensor], sink_logits: Tensor | None, alibi_slopes: Tensor | None,
      key_bias: Tensor | None, o: Tensor, lse: Tensor, d_o: Tensor, d_lse: Tensor | None, method: str, side_names: str,
      call: str, softcap: float, layer: int, n_layers: int, threads: int) -> list[Tensor]:  # fmt: skip
    return _empty_gradients(q, k, v, side, sink_logits, key_bias)


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, side, sink_logits, alibi_slopes, key_bias, *rest = inputs
    ctx.save_for_backward(q, k, v, sink_logits, alibi_slopes, key_bias, *output, *side)
    ctx.rest = rest[:-1]
    ctx.set_materialize_grads(False)


def _differentiate_attention(ctx: Any, d_o: Tensor | None, d_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, sink_logits, alibi_slopes, key_bias, o, lse, *side = ctx.saved_tensors
    if d_o is None:
        d_o = torch.zeros_like(o)
    gradients = _attention_backward(
        q, k, v, side, sink_logits, alibi_slopes, key_bias, o, lse, d_o, d_lse, *ctx.rest
    )
    d_q, d_k, d_v, *others = gradients
    d_side, others = others[: len(side)], others[len(side) :]
    return d_q, d_k, d_v, d_side, *_gradients_of_logits(others, sink_logits, key_bias), *[None] * (len(ctx.rest) + 1)


_attention.register_autograd(_differentiate_attention, setup_context=_save_attention)


# --- attention by a plan -------------------------------------------------------------------------------------------


@torch.library.custom_op("tessera::run_plan", mutates_args=(), device_types="cpu")
def _run_plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_logits: Tensor | None,
    alibi_slopes: Tensor | None,
    key_bias: Tensor | None,
    plan: int,
    softcap: float,
    threads: int,
    tokens_first: bool,
) -> tuple[Tensor, Tensor]:
    q, k, v = _rows(q), _rows(k), _rows(v)
    inputs = _inputs(q, k, v, (), "", sink_logits, alibi_slopes, key_bias, softcap)
    native = _plan_of(plan)._native
    inputs.check(native.problem)
    o, lse = _empty_results(q, v, tokens_first)
    _core.run(native, inputs, o, lse, _options("automatic", None, threads))
    return o, lse


@_run_plan.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, sink_logits: Tensor | None, alibi_slopes: Tensor | None, key_bias: Tensor | None,
      plan: int, softcap: float, threads: int, tokens_first: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _empty_results(q, v, tokens_first)


@torch.library.custom_op("tessera::run_plan_backward", mutates_args=(), device_types="cpu")
def _run_plan_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_logits: Tensor | None,
    alibi_slopes: Tensor | None,
    key_bias: Tensor | None,
    o: Tensor,
    lse: Tensor,
    d_o: Tensor,
    d_lse: Tensor | None,
    plan: int,
    softcap: float,
    threads: int,
) -> list[Tensor]:
    q, k, v = _rows(q), _rows(k), _rows(v)
    inputs = _inputs(q, k, v, (), "", sink_logits, alibi_slopes, key_bias, softcap)
    results = _empty_gradients(q, k, v, (), sink_logits, key_bias)
    _core.run_backward(
        _plan_of(plan)._native,
        inputs,
        *_saved(o, lse, d_o, d_lse),
        _wanted(results, "", sink_logits, key_bias),
        _options("automatic", None, threads),
    )
    return results


@_run_plan_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, sink_logits: Tensor | None, alibi_slopes: Tensor | None, key_bias: Tensor | None,
      o: Tensor, lse: Tensor, d_o: Tensor, d_lse: Tensor | None, plan: int, softcap: float, threads: int) -> list[Tensor]:  # fmt: skip
    return _empty_gradients(q, k, v, (), sink_logits, key_bias)


def _save_plan(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, sink_logits, alibi_slopes, key_bias, plan, softcap, threads, _ = inputs
    ctx.save_for_backward(q, k, v, sink_logits, alibi_slopes, key_bias, *output)
    ctx.rest = (plan, softcap, threads)
    ctx.plan = _PLANS.get(plan)  # lives as long as the graph
    ctx.set_materialize_grads(False)


def _differentiate_plan(ctx: Any, d_o: Tensor | None, d_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, sink_logits, alibi_slopes, key_bias, o, lse = ctx.saved_tensors
    if d_o is None:
        d_o = torch.zeros_like(o)
    d_q, d_k, d_v, *others = _run_plan_backward(
        q, k, v, sink_logits, alibi_slopes, key_bias, o, lse, d_o, d_lse, *ctx.rest
    )
    return d_q, d_k, d_v, *_gradients_of_logits(others, sink_logits, key_bias), *[None] * (len(ctx.rest) + 1)


_run_plan.register_autograd(_differentiate_plan, setup_context=_save_plan)


# --- functions -----------------------------------------------------------------------------------------------------


def _to_bhnd(x: Tensor, layout: str, name: str) -> Tensor:
    if not isinstance(x, Tensor):
        raise Error(f"{name} is of type {type(x).__name__}; expected a tensor")
    if x.device.type not in ("cpu", "meta"):
        raise Error(f"{name} lies on {x.device}; expected cpu")
    return bhnd(x, layout, name)


def _from_bhnd(o: Tensor, lse: Tensor, layout: str, packed: bool) -> tuple[Tensor, Tensor]:
    if len(layout) == 3 or packed:
        lse = lse.squeeze(0)
    if layout == "BNHD":
        return o.transpose(1, 2), lse
    if layout == "HND":
        return o.squeeze(0), lse
    return (o.squeeze(0).transpose(0, 1) if layout == "NHD" else o), lse


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    method: str | Method = "dense",
    *,
    causal: bool = False,
    scale: float | None = None,
    layout: str = "BHND",
    return_lse: bool = False,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    q_offset: int | None = None,
    grid: Grid | None = None,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    key_bias: Tensor | None = None,
    side: Mapping[str, Tensor] | None = None,
    layer: int = 0,
    n_layers: int = 1,
    threads: int = 0,
    **params: Value,
) -> Any:
    """`tessera.attention` with gradients of q, k, v, side tensors, sink logits and key bias.

    Methods whose phases lack "backward" run forward only: their backward pass raises Error. sink_logits and key_bias
    must be float32 and contiguous; key_bias [B or 1, Hq or Hkv or 1, Nk].
    """
    check_layout(layout)
    side = dict(sorted((side or {}).items()))
    o, lse = _attention(
        _to_bhnd(q, layout, "q"),
        _to_bhnd(k, layout, "k"),
        _to_bhnd(v, layout, "v"),
        list(side.values()),
        sink_logits,
        alibi_slopes,
        key_bias,
        _description(method, params),
        ",".join(side),
        _call_text(causal, scale, q_offset, cu_seqlens_q, cu_seqlens_k, grid),
        float(softcap or 0.0),
        layer,
        n_layers,
        threads,
        layout in ("BNHD", "NHD"),
    )
    o, lse = _from_bhnd(o, lse, layout, cu_seqlens_q is not None)
    return (o, lse) if return_lse else o


def run(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: str = "BHND",
    return_lse: bool = False,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    key_bias: Tensor | None = None,
    threads: int = 0,
) -> Any:
    """`tessera.run` with gradients of q, k, v, sink logits and key bias."""
    check_layout(layout)
    o, lse = _run_plan(
        _to_bhnd(q, layout, "q"),
        _to_bhnd(k, layout, "k"),
        _to_bhnd(v, layout, "v"),
        sink_logits,
        alibi_slopes,
        key_bias,
        _number_of(plan),
        float(softcap or 0.0),
        threads,
        layout in ("BNHD", "NHD"),
    )
    o, lse = _from_bhnd(o, lse, layout, bool(plan.problem.cu_seqlens_q))
    return (o, lse) if return_lse else o


# --- modules -------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Attention of any method on projected heads: (q, k, v) [B, H, N, D] -> o [B, Hq, Nq, Dv]."""

    def __init__(
        self, method: str | Method = "dense", *, causal: bool = True, layout: str = "BHND", layer: int = 0, n_layers: int = 1, **params: Value
    ) -> None:
        super().__init__()
        check_layout(layout)
        self.method = as_method(method, params)
        self.causal = causal
        self.layout = layout
        self.layer = layer
        self.n_layers = n_layers

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return attention(
            q, k, v, self.method, causal=self.causal, layout=self.layout, layer=self.layer, n_layers=self.n_layers, **options
        )

    def extra_repr(self) -> str:
        return f"{self.method!r}, causal={self.causal}, layout={self.layout}"


class MoBA(Attention):
    """Mixture of block attention (arXiv:2502.13189): top-k key blocks per query. No weights of its own."""

    def __init__(self, *, causal: bool = True, layout: str = "BHND", layer: int = 0, n_layers: int = 1, **params: Value) -> None:
        super().__init__("moba", causal=causal, layout=layout, layer=layer, n_layers=n_layers, **params)


class GatedAttention(nn.Module):
    """Another method's output times sigmoid(x W) per head or per value column (arXiv:2505.06708).

    Args:
        hidden_size: columns of the x that gates are made from.
        inner: method whose output is gated: a name with its defaults, or a JSON file.
        per_head: one gate per head instead of one per value column.
    """

    def __init__(
        self, hidden_size: int, q_heads: int, value_dim: int, *, inner: str = "dense", causal: bool = True, per_head: bool = False
    ) -> None:
        super().__init__()
        self.shape = (q_heads, 1 if per_head else value_dim)
        self.gate = nn.Linear(hidden_size, q_heads * self.shape[1], bias=False)
        self.method = Method("gated", inner=inner)
        self.causal = causal

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """x [B, Nq, hidden_size], q [B, Hq, Nq, D], k, v [B, Hkv, N, ...] -> [B, Hq, Nq, Dv]"""
        gate = self.gate(x).unflatten(-1, self.shape).transpose(1, 2)
        return attention(q, k, v, self.method, causal=self.causal, side={"gate": gate}, **options)


class NSA(nn.Module):
    """Native sparse attention (arXiv:2502.11089): compressed, selected and window branches added by gates.

    Weights: the gates' projection of x, and what compresses blocks of keys and values, by `compress`: "mean" (none),
    "pool", "linear" or "mlp". `positions` adds a learned vector to each row of a block before that.
    """

    def __init__(
        self,
        hidden_size: int,
        q_heads: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        compress: str = "mlp",
        positions: bool = True,
        **params: Value,
    ) -> None:
        super().__init__()
        value_dim = value_dim or head_dim
        self.method = Method("nsa", compress=compress, **params)
        self.q_heads = q_heads
        self.gate = nn.Linear(hidden_size, 3 * q_heads)
        length = int(self.method.parameters["length"])
        weights = {}
        for side, dim in (("k", head_dim), ("v", value_dim)):
            if positions:
                weights[f"positions_{side}"] = torch.zeros(kv_heads, length, dim)
            if compress == "pool":
                weights[f"pool_{side}"] = torch.full((kv_heads, length, 1), 1 / length)
            elif compress == "linear":
                weights[f"linear_{side}"] = torch.randn(kv_heads, length * dim, dim) * (length * dim) ** -0.5
            elif compress == "mlp":
                weights[f"hidden_{side}"] = torch.randn(kv_heads, length * dim, dim) * (length * dim) ** -0.5
                weights[f"output_{side}"] = torch.randn(kv_heads, dim, dim) * dim**-0.5
        self.weights = nn.ParameterDict(weights)

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """x [B, N, hidden_size], q [B, Hq, N, D], k, v [B, Hkv, N, ...] -> [B, Hq, N, Dv]; causal"""
        logits = self.gate(x).unflatten(-1, (self.q_heads, 3)).transpose(1, 2)
        side = {"gate_logits": logits, **self.weights, **options.pop("side", {})}
        return attention(q, k, v, self.method, causal=True, side=side, **options)


class SLA(nn.Module):
    """Sparse-linear attention (arXiv:2509.24006) with the learned projection of its linear branch, which starts as 0."""

    def __init__(self, value_dim: int, *, bias: bool = True, **params: Value) -> None:
        super().__init__()
        self.method = Method("sla", **params)
        self.projection = nn.Parameter(torch.zeros(value_dim, value_dim))
        self.bias = nn.Parameter(torch.zeros(value_dim)) if bias else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """q [B, Hq, N, D], k, v [B, Hkv, N, ...] -> [B, Hq, N, Dv]; not causal"""
        side = {"projection": self.projection}
        if self.bias is not None:
            side["bias"] = self.bias
        return attention(q, k, v, self.method, side=side, **options)


__all__ = ["Attention", "GatedAttention", "MoBA", "NSA", "SLA", "attention", "run"]
