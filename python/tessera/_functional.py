"""Attention calls on NumPy arrays, PyTorch tensors and other arrays with DLPack."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from . import _arrays, _core
from ._arrays import attention_operand, bhnd, check_layout, floats, integers, operand
from ._core import Error, Problem, State, TokenGrid
from ._methods import Method, Value, as_method
from ._plan import Plan

Grid = TokenGrid | Sequence[int] | str


class Report(NamedTuple):
    """What a call did."""

    kernel: str
    isa: str
    threads: int
    workspace_bytes: int
    plan_ms: float
    kernel_ms: float
    skipped_pairs: int


def as_grid(grid: Grid | None) -> TokenGrid | None:
    """A token grid from (frames, rows, columns), (rows, columns), (columns,) or "TxHxW"."""
    if grid is None or isinstance(grid, TokenGrid):
        return grid
    extent = grid.split("x") if isinstance(grid, str) else list(grid)
    try:
        numbers = [int(x) for x in extent]
    except (TypeError, ValueError):
        numbers = []
    if not 1 <= len(numbers) <= 3:
        raise Error(f"grid is {grid!r}; expected (frames, rows, columns), fewer of them, or a TokenGrid")
    return TokenGrid([1] * (3 - len(numbers)) + numbers)


def problem_of(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    scale: float | None = None,
    layout: str = "BHND",
    q_offset: int | None = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    grid: Grid | None = None,
) -> Problem:
    """The problem that these arrays pose. Raises Error where their shapes disagree. See `attention`."""
    check_layout(layout)
    qv, kv, vv = (attention_operand(x, layout, name) for x, name in ((q, "q"), (k, "k"), (v, "v")))
    return _problem(qv, kv, vv, causal, scale, q_offset, cu_seqlens_q, cu_seqlens_k, grid)


def _problem(
    q: Any,
    k: Any,
    v: Any,
    causal: bool,
    scale: float | None,
    q_offset: int | None,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    grid: Grid | None,
) -> Problem:
    lengths_q = [] if cu_seqlens_q is None else integers(cu_seqlens_q, "cu_seqlens_q", np.int64).tolist()
    lengths_k = lengths_q if cu_seqlens_k is None else integers(cu_seqlens_k, "cu_seqlens_k", np.int64).tolist()
    if lengths_k and not lengths_q:
        raise Error("cu_seqlens_k is given without cu_seqlens_q")
    for x, name in ((k, "k"), (v, "v")):
        if x.shape[0] != q.shape[0] or x.shape[2] != k.shape[2] or x.shape[1] != k.shape[1]:
            raise Error(
                f"{name} has shape {tuple(x.shape)} (batch, heads, tokens, dim); expected batch {q.shape[0]}, "
                f"{k.shape[1]} heads and {k.shape[2]} tokens"
            )
    if k.shape[3] != q.shape[3]:
        raise Error(f"k has head dim {k.shape[3]}; expected that of q, {q.shape[3]}")
    return Problem(
        batch=len(lengths_q) - 1 if lengths_q else q.shape[0],
        q_heads=q.shape[1],
        kv_heads=k.shape[1],
        q_len=q.shape[2],
        kv_len=k.shape[2],
        head_dim=q.shape[3],
        value_dim=v.shape[3],
        causal=bool(causal),
        scale=None if scale is None else float(scale),
        q_offset=q_offset,
        cu_seqlens_q=lengths_q,
        cu_seqlens_k=lengths_k,
        grid=as_grid(grid),
    )


def make_inputs(
    q: Any,
    k: Any,
    v: Any,
    *,
    query_scale: Any = None,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sink_logits: Any = None,
    key_bias: Any = None,
    side: Mapping[str, Any] | None = None,
    sources: Sequence[tuple[Any, Any, Any]] = (),
    page_table: Any = None,
    page_size: int = 0,
) -> _core.Inputs:
    """Inputs of a call from [batch, heads, tokens, dim] views."""
    bias = floats(key_bias, "key_bias")
    if bias is not None:
        bias = bias[..., None]  # [batch, heads, keys] and fewer leading axes
    return _core.Inputs(
        q,
        k,
        v,
        query_scale=floats(query_scale, "query_scale"),
        softcap=float(softcap or 0.0),
        alibi_slopes=floats(alibi_slopes, "alibi_slopes"),
        sink_logits=floats(sink_logits, "sink_logits"),
        key_bias=bias,
        sources=[
            (operand(sk, "sources k"), operand(sv, "sources v"), floats(weight, "sources log_weight"))
            for sk, sv, weight in sources
        ],
        side={name: operand(x, f"side {name}") for name, x in (side or {}).items()},
        page_table=None if page_table is None else integers(page_table, "page_table"),
        page_size=page_size,
    )


def _options(backend: str, isa: str | None, threads: int, layer: int = 0, n_layers: int = 1) -> _core.CallOptions:
    return _core.CallOptions(backend, isa or "", threads, layer, n_layers)


def _outputs(problem: Problem, q: Any, layout: str, out: Any, return_lse: bool) -> tuple[Any, Any, Any, Any]:
    batch = 1 if problem.cu_seqlens_q else problem.batch
    o, o_view = _arrays.output(out, q, layout, (batch, problem.q_heads, problem.q_len, problem.value_dim))
    if not return_lse:
        return o, o_view, None, None
    lse = _arrays.empty(q, (batch, problem.q_heads, problem.q_len), "float32")
    squeezed = problem.cu_seqlens_q or len(layout) == 3
    return o, o_view, lse[0] if squeezed else lse, lse


def _results(o: Any, lse: Any, plan: Plan | None, want_plan: bool) -> Any:
    parts = [o]
    if lse is not None:
        parts.append(lse)
    if want_plan:
        parts.append(plan)
    return parts[0] if len(parts) == 1 else tuple(parts)


def wants_torch_operator(*arrays: Any) -> bool:
    """Whether gradients or a compiler ask for the registered operators of PyTorch."""
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    tensors = [x for x in arrays if isinstance(x, torch.Tensor)]
    if not tensors:
        return False
    return torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))


def _refuse_choices(backend: str, isa: str | None) -> None:
    if backend != "automatic" or isa is not None:
        raise Error("backend and isa are for calls without gradients; TESSERA_ISA chooses an instruction set for all")


def attention(
    q: Any,
    k: Any,
    v: Any,
    method: str | Method = "dense",
    *,
    causal: bool = False,
    scale: float | None = None,
    layout: str = "BHND",
    return_lse: bool = False,
    return_plan: bool = False,
    out: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    q_offset: int | None = None,
    grid: Grid | None = None,
    softcap: float = 0.0,
    sink_logits: Any = None,
    alibi_slopes: Any = None,
    key_bias: Any = None,
    query_scale: Any = None,
    side: Mapping[str, Any] | None = None,
    state: State | None = None,
    layer: int = 0,
    n_layers: int = 1,
    backend: str = "automatic",
    isa: str | None = None,
    threads: int = 0,
    **params: Value,
) -> Any:
    """softmax(scale * q k^T) v over the pairs that a method chooses.

    Args:
        q: [B, Hq, Nq, D] in the order of `layout`; float32, bfloat16 (PyTorch, ml_dtypes) or float16. Any strides,
            no copy as long as the elements of a row are neighbours.
        k: [B, Hkv, Nk, D]; Hkv divides Hq, and query head h reads key head h // (Hq / Hkv).
        v: [B, Hkv, Nk, Dv], of the dtype of k.
        method: name, "name:key=value,...", path of a JSON file, or a `tessera.Method`. See `tessera.methods()`.
        causal: the query at position p sees keys up to p. Queries are the last tokens (bottom-right alignment).
        scale: factor of the scores; None: 1 / sqrt(D).
        layout: "BHND" or "BNHD"; without batch axis "HND" or "NHD", as variable-length batches are packed.
        return_lse: also return the natural-log log-sum-exp of each row, float32 [B, Hq, Nq] ([Hq, Nq] where the batch
            axis is absent or packed); -inf where a row sees no key.
        return_plan: also return the `tessera.Plan` that ran (None for recurrences).
        out: array that receives the output; float32, bfloat16 or float16.
        cu_seqlens_q: offsets int [sequences + 1] of packed sequences on the token axis (batch 1).
        cu_seqlens_k: likewise of the keys; None: those of the queries.
        q_offset: position of the first query among the keys, where it is not bottom-right.
        grid: where the tokens lie, for video and image methods: (frames, rows, columns) or a `tessera.TokenGrid`.
        softcap: s <- softcap * tanh(s / softcap); 0: off.
        sink_logits: float [Hq]: exp(sink) joins the denominator.
        alibi_slopes: float [Hq]: s += slope * (key position - query position).
        key_bias: float [B or 1, Hq or Hkv or 1, Nk], or fewer leading axes: added to the scores of a key.
        query_scale: float [Nq]: s *= scale of the query.
        side: further arrays that the method reads, by name.
        state: from `Method.new_state()`, for methods that remember earlier calls.
        layer: where in a model the call happens, for methods that treat layers differently.
        n_layers: of how many.
        backend: "automatic", "reference" (float64), "query-major", "key-major" or "split-key".
        isa: instruction set; None: the best that the machine has.
        threads: 0: OpenMP's default. Results do not depend on it.
        **params: parameters of the method. Names that are arguments here go into the text of `method`.

    Returns:
        o, of the layout and dtype of q with Dv columns, of NumPy or PyTorch like q; or (o, lse), (o, plan),
        (o, lse, plan). Rows without keys are 0. Tensors that require gradients get an o and lse that carry them.

    Raises:
        Error (a ValueError): shapes, dtypes, names or values that do not fit, naming the argument.
    """
    if wants_torch_operator(q, k, v, sink_logits, key_bias, *(side or {}).values()):
        if return_plan or state is not None or out is not None or query_scale is not None:
            raise Error("return_plan, state, out and query_scale know no gradients; use them under torch.no_grad()")
        _refuse_choices(backend, isa)
        from . import torch as tessera_torch

        return tessera_torch.attention(
            q,
            k,
            v,
            method,
            causal=causal,
            scale=scale,
            layout=layout,
            return_lse=return_lse,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            q_offset=q_offset,
            grid=grid,
            softcap=softcap,
            sink_logits=sink_logits,
            alibi_slopes=alibi_slopes,
            key_bias=key_bias,
            side=side,
            layer=layer,
            n_layers=n_layers,
            threads=threads,
            **params,
        )
    check_layout(layout)
    bound = as_method(method, params)
    qv, kv, vv = (attention_operand(x, layout, name) for x, name in ((q, "q"), (k, "k"), (v, "v")))
    problem = _problem(qv, kv, vv, causal, scale, q_offset, cu_seqlens_q, cu_seqlens_k, grid)
    inputs = make_inputs(
        qv,
        kv,
        vv,
        query_scale=query_scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sink_logits=sink_logits,
        key_bias=key_bias,
        side=side,
    )
    inputs.check(problem)
    o, o_view, lse, lse_buffer = _outputs(problem, q, layout, out, return_lse)
    options = _options(backend, isa, threads, layer, n_layers)
    _, native = bound._handle.attend(problem, inputs, o_view, lse_buffer, options, state, return_plan)
    return _results(o, lse, None if native is None else Plan(native), return_plan)


def plan(
    q: Any,
    k: Any,
    v: Any | None = None,
    method: str | Method = "dense",
    *,
    causal: bool = False,
    scale: float | None = None,
    layout: str = "BHND",
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    q_offset: int | None = None,
    grid: Grid | None = None,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    key_bias: Any = None,
    side: Mapping[str, Any] | None = None,
    state: State | None = None,
    layer: int = 0,
    n_layers: int = 1,
    isa: str | None = None,
    threads: int = 0,
    **params: Value,
) -> Plan:
    """What a method would compute for these queries and keys, without computing it. Arguments as in `attention`.

    v may be None: values of the shape of k. Raises Error for a recurrence, which has no plan.
    """
    check_layout(layout)
    qv, kv = attention_operand(q, layout, "q"), attention_operand(k, layout, "k")
    vv = kv if v is None else attention_operand(v, layout, "v")
    bound = as_method(method, params)
    problem = _problem(qv, kv, vv, causal, scale, q_offset, cu_seqlens_q, cu_seqlens_k, grid)
    inputs = make_inputs(qv, kv, vv, softcap=softcap, alibi_slopes=alibi_slopes, key_bias=key_bias, side=side)
    inputs.check(problem)
    return Plan(bound._handle.plan(problem, inputs, _options("automatic", isa, threads, layer, n_layers), state))


def run(
    plan: Plan,
    q: Any,
    k: Any,
    v: Any,
    *,
    layout: str = "BHND",
    return_lse: bool = False,
    return_report: bool = False,
    out: Any = None,
    softcap: float = 0.0,
    sink_logits: Any = None,
    alibi_slopes: Any = None,
    key_bias: Any = None,
    query_scale: Any = None,
    sources: Sequence[tuple[Any, Any, Any]] = (),
    page_table: Any = None,
    page_size: int = 0,
    backend: str = "automatic",
    isa: str | None = None,
    threads: int = 0,
) -> Any:
    """Attention over the pairs of a plan. Scale and causality are those of `plan.problem`.

    Arguments as in `attention`, and:

    Args:
        return_report: also return a `tessera.Report`, last.
        sources: (k, v, log-weight) of each derived key source of the plan: [B, Hkv, keys, D], [B, Hkv, keys, Dv] and
            float [B, Hkv, keys] or None.
        page_table: int [B, pages per sequence]. k and v are then pools [pages, Hkv, page_size, D] (layout "BHND").
    """
    if not isinstance(plan, Plan):
        raise Error(f"plan is of type {type(plan).__name__}; expected a tessera.Plan")
    if wants_torch_operator(q, k, v, sink_logits, key_bias):
        if return_report or out is not None or sources or page_table is not None or query_scale is not None:
            raise Error("return_report, out, sources, pages and query_scale know no gradients; use them under torch.no_grad()")
        _refuse_choices(backend, isa)
        from . import torch as tessera_torch

        return tessera_torch.run(
            plan,
            q,
            k,
            v,
            layout=layout,
            return_lse=return_lse,
            softcap=softcap,
            sink_logits=sink_logits,
            alibi_slopes=alibi_slopes,
            key_bias=key_bias,
            threads=threads,
        )
    check_layout(layout)
    qv = attention_operand(q, layout, "q")
    if page_table is None:
        kv, vv = attention_operand(k, layout, "k"), attention_operand(v, layout, "v")
    else:
        kv, vv = (bhnd(operand(x, name), "BHND", name) for x, name in ((k, "k"), (v, "v")))
    inputs = make_inputs(
        qv,
        kv,
        vv,
        query_scale=query_scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sink_logits=sink_logits,
        key_bias=key_bias,
        sources=sources,
        page_table=page_table,
        page_size=page_size,
    )
    inputs.check(plan.problem)
    o, o_view, lse, lse_buffer = _outputs(plan.problem, q, layout, out, return_lse)
    report = _core.run(plan._native, inputs, o_view, lse_buffer, _options(backend, isa, threads))
    result = _results(o, lse, None, False)
    if not return_report:
        return result
    return (*result, Report(**report)) if isinstance(result, tuple) else (result, Report(**report))


class Gradients(NamedTuple):
    """Of a loss, in the layout and dtype of what they belong to."""

    d_q: Any
    d_k: Any
    d_v: Any


def run_backward(
    plan: Plan,
    q: Any,
    k: Any,
    v: Any,
    o: Any,
    lse: Any,
    d_o: Any,
    *,
    d_lse: Any = None,
    layout: str = "BHND",
    softcap: float = 0.0,
    sink_logits: Any = None,
    alibi_slopes: Any = None,
    key_bias: Any = None,
    backend: str = "automatic",
    isa: str | None = None,
    threads: int = 0,
) -> Gradients:
    """Gradients of `run` for the gradient d_o of its output; the plan is a constant.

    Args:
        o: what `run(..., return_lse=True)` returned first.
        lse: what it returned second.
        d_o: gradient of the loss by o.
        d_lse: by lse, where the LSE is used itself; None: 0.
        backend: "automatic", "reference", "query-major" or "key-major".
    """
    check_layout(layout)
    views = [attention_operand(x, layout, n) for x, n in ((q, "q"), (k, "k"), (v, "v"), (o, "o"), (d_o, "d_o"))]
    inputs = make_inputs(
        *views[:3], softcap=softcap, alibi_slopes=alibi_slopes, sink_logits=sink_logits, key_bias=key_bias
    )
    inputs.check(plan.problem)
    results = [_arrays.output(None, x, layout, tuple(view.shape)) for x, view in zip((q, k, v), views)]
    wanted = _core.Gradients(d_q=results[0][1], d_k=results[1][1], d_v=results[2][1])
    _core.run_backward(
        plan._native,
        inputs,
        views[3],
        floats(lse, "lse"),
        views[4],
        floats(d_lse, "d_lse"),
        wanted,
        _options(backend, isa, threads),
    )
    return Gradients(*(result for result, _ in results))


__all__ = ["Gradients", "Report", "attention", "plan", "problem_of", "run", "run_backward"]

