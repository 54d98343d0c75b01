"""Arrays of callers as what the extension module reads: [batch, heads, tokens, dim] views, without a copy."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from ._core import Error

LAYOUTS = ("BHND", "BNHD", "HND", "NHD")
_ATTENTION_DTYPES = ("float32", "bfloat16", "float16")


def is_tensor(x: Any) -> bool:
    """True for tensors of PyTorch, which is not imported for the question."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise Error(f"layout is {layout!r}; expected one of {', '.join(LAYOUTS)}")


def dtype_name(x: Any) -> str:
    return str(x.dtype).removeprefix("torch.")


def _numpy_operand(x: np.ndarray, name: str) -> np.ndarray:
    if not x.dtype.isnative:
        raise Error(f"{name} has dtype {x.dtype.str}, of foreign byte order; expected native float32, bfloat16 or float16")
    if x.dtype.name == "bfloat16":  # ml_dtypes; DLPack exchanges no dtypes that NumPy has no name for
        x = x.view(np.uint16)
    unit = x.ndim == 0 or x.shape[-1] == 1 or x.strides[-1] == x.itemsize
    whole = all(stride % x.itemsize == 0 for stride in x.strides) and x.ctypes.data % x.itemsize == 0
    return x if unit and whole else np.ascontiguousarray(x)


def _tensor_operand(x: Any, name: str) -> Any:
    torch = sys.modules["torch"]
    if x.device.type != "cpu":
        raise Error(f"{name} lies on {x.device}; expected cpu")
    if x.layout != torch.strided:
        raise Error(f"{name} has layout {x.layout}; expected strided")
    x = x.detach()
    return x if x.dim() == 0 or x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()


def operand(x: Any, name: str) -> Any:
    """An array that the extension module takes. Copied only where rows are not contiguous."""
    if is_tensor(x):
        return _tensor_operand(x, name)
    if isinstance(x, np.ndarray):
        return _numpy_operand(x, name)
    if hasattr(x, "__dlpack__"):
        try:
            return _numpy_operand(np.from_dlpack(x), name)
        except (BufferError, TypeError, RuntimeError) as error:
            raise Error(f"{name} cannot be read by DLPack: {error}") from error
    raise Error(f"{name} is of type {type(x).__name__}; expected a NumPy array, a PyTorch tensor or another array with DLPack")


def _permute(x: Any, axes: Sequence[int]) -> Any:
    return x.permute(*axes) if is_tensor(x) else x.transpose(axes)


def bhnd(x: Any, layout: str, name: str) -> Any:
    """`x` as [batch, heads, tokens, dim]; a view."""
    expected = 4 if len(layout) == 4 else 3
    if x.ndim != expected:
        raise Error(f"{name} has {x.ndim} axes, {tuple(x.shape)}; expected {expected} for layout {layout}")
    if layout == "BNHD":
        return _permute(x, (0, 2, 1, 3))
    if layout == "HND":
        return x[None]
    if layout == "NHD":
        return _permute(x, (1, 0, 2))[None]
    return x


def attention_operand(x: Any, layout: str, name: str) -> Any:
    """q, k or v as the extension module takes it."""
    taken = operand(x, name)
    return bhnd(taken, layout, name)


def shape_in(layout: str, batch: int, heads: int, tokens: int, dim: int) -> tuple[int, ...]:
    return {
        "BHND": (batch, heads, tokens, dim),
        "BNHD": (batch, tokens, heads, dim),
        "HND": (heads, tokens, dim),
        "NHD": (tokens, heads, dim),
    }[layout]


def empty(like: Any, shape: tuple[int, ...], dtype: Any = None) -> Any:
    """An uninitialised array of the framework of `like`; other frameworks than PyTorch get NumPy's."""
    if is_tensor(like):
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=like.dtype if dtype is None else getattr(torch, dtype))
    if dtype is None:
        dtype = like.dtype if isinstance(like, np.ndarray) else np.from_dlpack(like).dtype
    return np.empty(shape, dtype=dtype)


def output(out: Any, like: Any, layout: str, shape: tuple[int, int, int, int]) -> tuple[Any, Any]:
    """(what the caller gets, what the extension module writes): `out` checked, or a new array."""
    wanted = shape_in(layout, *shape)
    if out is None:
        out = empty(like, wanted)
    if tuple(out.shape) != wanted:
        raise Error(f"out has shape {tuple(out.shape)}; expected {wanted}")
    if dtype_name(out) not in _ATTENTION_DTYPES:
        raise Error(f"out has dtype {dtype_name(out)}; expected float32, bfloat16 or float16")
    if isinstance(out, np.ndarray):
        if not out.flags.writeable:
            raise Error("out is read-only")
        taken = _numpy_operand(out, "out")
    elif is_tensor(out):
        if out.requires_grad and sys.modules["torch"].is_grad_enabled():
            raise Error("out requires gradients; expected a tensor without, or none")
        taken = _tensor_operand(out, "out")
    else:
        raise Error(f"out is of type {type(out).__name__}; expected a NumPy array or a PyTorch tensor")
    if _address(taken) != _address(out):
        raise Error("out has rows that are not contiguous")
    return out, bhnd(taken, layout, "out")


def _address(x: Any) -> int:
    return x.data_ptr() if is_tensor(x) else x.ctypes.data


def floats(x: Any, name: str) -> Any:
    """A contiguous float32 array of numbers, copied where it is not one."""
    if x is None:
        return None
    if is_tensor(x):
        return operand(x.float().contiguous(), name)
    return np.ascontiguousarray(np.asarray(x, dtype=np.float32))


def integers(x: Any, name: str, dtype: Any = np.int32) -> np.ndarray:
    """A contiguous array of integers, copied where it is not one. Raises Error for numbers that are none."""
    array = x.detach().cpu().numpy() if is_tensor(x) else np.asarray(x)
    if array.dtype.kind not in "iu":
        raise Error(f"{name} has dtype {array.dtype}; expected integers")
    return np.ascontiguousarray(array, dtype=dtype)
