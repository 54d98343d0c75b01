"""Methods in video and image transformers of Diffusers.

    import tessera.integrations.diffusers as integration
    grid = integration.grid_of(pipe.transformer, latents.shape, prefix=text_tokens)
    with integration.attention("sla", grid=grid):
        pipe(...)

Inside, the dispatcher of Diffusers uses the backend "tessera", and calls of scaled_dot_product_attention by models that
pass the dispatcher by (CogVideoX) come here too. Self-attention over the tokens of the grid runs the method; everything
else, such as cross-attention to a text, runs dense attention. Masks of padding at the end become shorter sequences; calls
with other masks, which text encoders make, stay with PyTorch.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers.models import attention_dispatch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._core import Error, State, TokenGrid
from .._functional import Grid, as_grid
from .._functional import attention as run_attention
from .._methods import Method, Value, as_method

BACKEND = "tessera"


@dataclasses.dataclass
class Use:
    """How the calls inside `attention` run, and how many there were."""

    method: Method
    grid: TokenGrid | None
    n_layers: int
    state: State | None
    calls: int = 0
    """Calls that ran the method."""
    others: int = 0
    """Calls that ran dense attention: cross-attention, other lengths."""


_ACTIVE: contextvars.ContextVar[Use | None] = contextvars.ContextVar("tessera_diffusers", default=None)


def grid_of(
    transformer: Any, latents: Sequence[int], *, prefix: int = 0, suffix: int = 0
) -> TokenGrid:
    """Tokens that a transformer makes of latents [..., frames, rows, columns] or [..., rows, columns].

    Patch sizes come from `transformer.config`: patch_size (a number or one per axis) and patch_size_t.

    Args:
        latents: their shape; images may leave out the frames.
        prefix: text tokens that the model puts before them (Flux, CogVideoX).
        suffix: text tokens that it puts after them (HunyuanVideo).
    """
    patch = getattr(transformer.config, "patch_size", 1)
    along_time = getattr(transformer.config, "patch_size_t", None)
    if not isinstance(patch, int):
        patches = [int(x) for x in patch]
    else:
        patches = [int(along_time or 1), patch, patch]
    size = [int(x) for x in latents][-len(patches) :] if len(latents) > 4 else [1, *[int(x) for x in latents][-2:]]
    if any(n % p for n, p in zip(size, patches, strict=True)):
        raise Error(f"latents of {size} (frames, rows, columns) are no multiple of the patches {patches}")
    return TokenGrid([n // p for n, p in zip(size, patches, strict=True)], prefix, suffix)


def _lengths(mask: Tensor, batch: int, keys: int) -> list[int] | None:
    """Tokens of each sequence, of a mask [batch, 1, 1, keys] that hides the last ones; None for any other mask."""
    while mask.dim() < 4:
        mask = mask.unsqueeze(1)
    if mask.dtype != torch.bool or mask.shape[1:] != (1, 1, keys):
        return None
    rows = mask[:, 0, 0].expand(batch, keys)
    lengths = rows.sum(1)
    hides_the_end = (rows == (torch.arange(keys) < lengths[:, None])).all()
    return lengths.tolist() if bool(hides_the_end) else None


def _by_pytorch(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, is_causal: bool, scale: float | None
) -> Tensor:
    views = [x.transpose(1, 2) for x in (query, key, value)]
    with torch._C.DisableTorchFunction():
        o = torch.nn.functional.scaled_dot_product_attention(
            *views, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=key.shape[2] != query.shape[2]
        )
    return o.transpose(1, 2)


def attend(
    use: Use, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    """One call, [batch, tokens, heads, dim] in and out."""
    batch, queries, keys = query.shape[0], query.shape[1], key.shape[1]
    own = queries == keys and (use.grid is None or use.grid.tokens == keys) and not is_causal
    lengths = [keys] * batch if attn_mask is None else _lengths(attn_mask, batch, keys)
    if attn_mask is not None and lengths is None:
        if own and use.grid is not None:
            raise Error(
                f"attn_mask of the grid's tokens has shape {tuple(attn_mask.shape)} and dtype {attn_mask.dtype}; expected "
                f"bool [{batch}, 1, 1, {keys}] with padding at the end"
            )
        use.others += 1
        return _by_pytorch(query, key, value, attn_mask, is_causal, scale)
    if own:
        layer = use.calls % use.n_layers
        use.calls += 1
    else:
        use.others += 1

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        options: dict[str, Any] = {"layout": "BNHD", "scale": scale, "causal": is_causal}
        if own and use.grid is not None:
            hidden = use.grid.tokens - k.shape[1]
            if hidden > use.grid.suffix:
                raise Error(f"attn_mask hides {hidden} tokens; the grid has {use.grid.suffix} text tokens at its end")
            options["grid"] = TokenGrid(use.grid.extent, use.grid.prefix, use.grid.suffix - hidden)
        if own:
            options |= {"layer": layer, "n_layers": use.n_layers, "state": use.state}
        return run_attention(q, k, v, use.method if own else "dense", **options)

    if lengths is None or min(lengths) == keys:
        return call(query, key, value)
    out = query.new_zeros(*query.shape[:3], value.shape[3])
    for b, length in enumerate(lengths):
        rows = length if own else queries
        if length > 0:
            out[b : b + 1, :rows] = call(query[b : b + 1, :rows], key[b : b + 1, :length], value[b : b + 1, :length])
    return out


def _use() -> Use:
    use = _ACTIVE.get()
    if use is None:
        raise Error("the attention backend tessera runs inside of tessera.integrations.diffusers.attention(...)")
    return use


@attention_dispatch._AttentionBackendRegistry.register(BACKEND)
def _backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: Any = None,
) -> Tensor:
    if dropout_p:
        raise Error(f"dropout_p is {dropout_p}; expected 0")
    if _parallel_config is not None:
        raise Error("tessera has no context parallelism in Diffusers")
    return attend(_use(), query, key, value, attn_mask, is_causal, scale)


class _Direct(TorchFunctionMode):
    """Calls of scaled_dot_product_attention that do not come through the dispatcher."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is not torch.nn.functional.scaled_dot_product_attention:
            return function(*args, **kwargs)
        given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False)) | kwargs
        if given.get("dropout_p"):
            raise Error(f"dropout_p is {given['dropout_p']}; expected 0")
        q, k, v = (given[name].transpose(1, 2) for name in ("query", "key", "value"))
        o = attend(_use(), q, k, v, given.get("attn_mask"), given.get("is_causal", False), given.get("scale"))
        return o.transpose(1, 2)


@contextlib.contextmanager
def attention(
    method: str | Method, *, grid: Grid | None = None, n_layers: int = 1, **params: Value
) -> Iterator[Use]:
    """Inside, models of Diffusers attend with a method.

    Args:
        method: name, SPEC, file or `tessera.Method`; params: its parameters.
        grid: where the tokens lie; see `grid_of`. None: every self-attention runs the method, without a grid.
        n_layers: self-attention calls of one denoising step, for methods that tell layers apart.
    """
    bound = as_method(method, params)
    use = Use(bound, as_grid(grid), n_layers, bound.new_state())
    registry = attention_dispatch._AttentionBackendRegistry
    before, _ = registry.get_active_backend()
    token = _ACTIVE.set(use)
    registry.set_active_backend(BACKEND)
    try:
        with _Direct():
            yield use
    finally:
        registry.set_active_backend(before)
        _ACTIVE.reset(token)
