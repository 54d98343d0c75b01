"""Every method as an `attn_implementation` of Hugging Face Transformers.

    import tessera.integrations.transformers as integration
    integration.register()
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="tessera_xattention")

The name of method "tri-shape" is "tessera_tri_shape". `register_as` gives a name to a method with parameters, to another
method for decoding, or to one per layer. Attention and mask functions are registered together; masks stay
[batch, keys] at most: padding becomes slices of the keys, packed sequences become separate calls, and sliding windows
are the method "window". What a model asks for beyond that (position biases, 4-axis masks, bidirectional blocks, dropout
in training) raises Error.

* Prefill runs the method where it supports prefill, decoding where it supports decoding; dense attention else.
* Layers with a sliding window run exactly that window while there are more keys than it holds: they are sparse already.
* The cache is that of Transformers: methods that evict choose what they read, and free no memory. `tessera.Model`
  runs them with their own cache.
* Methods that remember earlier calls keep one state per model, which a new prompt clears: one sequence batch at a time.
"""

from __future__ import annotations

import dataclasses
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function, causal_mask_function

from .._core import Error, State
from .._functional import attention
from .._methods import Method, MethodInfo, as_method, methods

PREFIX = "tessera_"

MethodChoice = str | Method | Sequence[str | Method] | Mapping[str, str | Method]


def implementation_name(method: str, prefix: str = PREFIX) -> str:
    """Name of a method among attention implementations: "tri-shape" -> "tessera_tri_shape"."""
    return prefix + method.replace("-", "_")


def _suits(info: MethodInfo) -> bool:
    return info.causal and not any(side.required for side in info.side_inputs)


def supported_methods() -> list[str]:
    """Methods that need no tensors beside q, k, v, and are defined for causal attention."""
    return [name for name, info in methods().items() if _suits(info)]


# --- which method where --------------------------------------------------------------------------------------------

_RANGE = re.compile(r"(\d+)(-(\d*))?\Z")


def _layers_of(text: str, layers: int) -> range:
    found = _RANGE.match(text)
    if not found:
        raise Error(f"layers {text!r}; expected a number, a range as 2-5, or an open one as 2-")
    first = int(found[1])
    last = first if found[2] is None else int(found[3]) if found[3] else layers - 1
    return range(first, last + 1)


def _per_layer(choice: MethodChoice, layers: int) -> list[Method]:
    """One method for each of `layers` layers. Raises Error unless every layer has exactly one."""
    if isinstance(choice, str | Method):
        return [as_method(choice)] * layers
    if isinstance(choice, Mapping):
        result: list[Method | None] = [None] * layers
        for text, method in choice.items():
            for layer in _layers_of(text, layers):
                if layer >= layers or result[layer] is not None:
                    raise Error(f"layers {text!r}: layer {layer} is none of {layers}, or has a method already")
                result[layer] = as_method(method)
        if None in result:
            raise Error(f"layer {result.index(None)} of {layers} has no method")
        return [method for method in result if method is not None]
    if len(choice) != layers:
        raise Error(f"{len(choice)} methods are given for a model of {layers} layers")
    return [as_method(method) for method in choice]


@dataclasses.dataclass
class _Implementation:
    prefill: MethodChoice
    decode: MethodChoice | None
    chosen: dict[tuple[int, bool], list[Method]] = dataclasses.field(default_factory=dict)

    def method(self, layer: int, layers: int, decoding: bool) -> Method:
        key = (layers, decoding)
        if key not in self.chosen:
            given = self.decode if decoding and self.decode is not None else self.prefill
            phase = "decode" if decoding else "prefill"
            strict = decoding and self.decode is not None
            self.chosen[key] = [self._of_phase(method, phase, strict) for method in _per_layer(given, layers)]
        return self.chosen[key][layer]

    @staticmethod
    def _of_phase(method: Method, phase: str, strict: bool) -> Method:
        if phase in method.info.phases:
            return method
        if strict:
            raise Error(f"{method.name} does not support {phase}; it supports {', '.join(method.info.phases)}")
        return as_method("dense")


_STATES: dict[int, dict[str, State]] = {}


def _state(module: Any, method: Method, fresh: bool) -> State | None:
    """The state of a method in the model of this layer; a new one where a prompt begins."""
    config = module.config
    if id(config) not in _STATES:
        state = method.new_state()
        if state is None:
            return None
        _STATES[id(config)] = {}
        weakref.finalize(config, _STATES.pop, id(config), None)
    states = _STATES[id(config)]
    if (fresh and getattr(module, "layer_idx", 0) == 0) or method.description not in states:
        state = method.new_state()
        if state is None:
            return None
        states[method.description] = state
    return states[method.description]


# --- masks: [batch, keys] at most ----------------------------------------------------------------------------------

_KNOWN_PARTS = ("sliding_window_overlay", "sliding_window_bidirectional_overlay", "padding_mask_function")


def _closure(function: Callable[..., Any]) -> dict[str, Any]:
    cells = function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, cells, strict=True)}


def _parts(function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """The functions that a mask function intersects."""
    name = function.__qualname__
    if name.startswith("and_masks."):
        for part in _closure(function)["mask_functions"]:
            yield from _parts(part)
    elif name.startswith("remap_positions_for_packed_sequence."):
        yield from _parts(_closure(function)["mask_function"])
    else:
        yield function


def _sequence_numbers(function: Callable[..., Any]) -> Tensor | None:
    """Which packed sequence each token belongs to, int [batch, tokens], of a mask function of Transformers."""
    if function is causal_mask_function or function is bidirectional_mask_function:
        return None
    numbers = None
    for part in _parts(function):
        name = part.__qualname__.split(".")[0]
        if name == "packed_sequence_mask_function":
            numbers = _closure(part)["packed_sequence_mask"]
        elif part not in (causal_mask_function, bidirectional_mask_function) and name not in _KNOWN_PARTS:
            raise Error(f"the model asks for the mask {name}, which tessera has not; expected causal, sliding, padded or packed")
    return numbers


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> Tensor | None:
    """What `attend` needs to know beside causality: None, bool [batch, keys seen] (True = token), or int [batch, tokens]
    numbers of packed sequences."""
    numbers = _sequence_numbers(mask_function)
    if numbers is not None:
        return numbers.to(torch.int32)
    seen = kv_length
    causal = all(part is not bidirectional_mask_function for part in _parts(mask_function))
    if causal:  # a static cache is longer than what has been written
        seen = min(kv_length, int(q_offset) + q_length - kv_offset)
    if attention_mask is not None:
        attention_mask = attention_mask[:, kv_offset : kv_offset + seen].to(torch.bool)
        missing = seen - attention_mask.shape[1]
        if missing > 0:
            attention_mask = torch.nn.functional.pad(attention_mask, (0, missing), value=True)
        if attention_mask.all():
            attention_mask = None
    if attention_mask is None:
        return None if seen == kv_length else torch.ones(batch_size, seen, dtype=torch.bool)
    return attention_mask


# --- attention -----------------------------------------------------------------------------------------------------


def _refuse(module: Any, mask: Tensor | None, dropout: float, options: Mapping[str, Any]) -> None:
    if dropout and module.training:
        raise Error(f"dropout is {dropout} in training; expected 0")
    if options.get("position_bias") is not None:
        raise Error("the model adds position biases, which tessera has not")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        raise Error(f"attention_mask has shape {tuple(getattr(mask, 'shape', ()))}; expected [batch, keys] (True = token)")


def _attend_padded(call: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, mask: Tensor, causal: bool) -> Tensor:
    """Sequence by sequence over the keys that are tokens, [batch, tokens, heads, dim]; rows of padding are 0."""
    k, v = k[:, : mask.shape[1]], v[:, : mask.shape[1]]
    first = mask.shape[1] - q.shape[1]
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    for b in range(q.shape[0]):
        tokens = mask[b].nonzero()[:, 0]
        queries = tokens[tokens >= first] - first if causal else torch.arange(q.shape[1])
        if len(tokens) == 0 or len(queries) == 0:
            continue
        o = call(_rows(q[b : b + 1], queries), _rows(k[b : b + 1], tokens), _rows(v[b : b + 1], tokens))
        out[b, int(queries[0]) : int(queries[-1]) + 1][queries - queries[0]] = o[0]
    return out


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x[:, index]; a view where the rows are neighbours."""
    begin, end = int(index[0]), int(index[-1]) + 1
    return x[:, begin:end] if end - begin == len(index) else x[:, index]


def _attend_packed(call: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, numbers: Tensor) -> Tensor:
    """Each packed sequence on its own."""
    rows = []
    for b in range(q.shape[0]):
        changes = (numbers[b].diff() != 0).nonzero()[:, 0] + 1
        bounds = [0, *changes.tolist(), q.shape[1]]
        parts = [
            call(*(x[b : b + 1, begin:end] for x in (q, k, v))) for begin, end in zip(bounds[:-1], bounds[1:], strict=True)
        ]
        rows.append(torch.cat(parts, dim=1))
    return torch.cat(rows)


def attend(
    implementation: _Implementation,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer: [B, H, N, D] in, [B, N, Hq, Dv] out. Weights are not returned."""
    _refuse(module, attention_mask, dropout, options)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    layer = getattr(module, "layer_idx", None) or 0
    layers = max(getattr(module.config, "num_hidden_layers", 1), layer + 1)
    decoding = q.shape[1] == 1 and k.shape[1] > 1
    method = implementation.method(layer, layers, decoding)
    state = _state(module, method, fresh=q.shape[1] > 1 and q.shape[1] == k.shape[1])

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        chosen, remembered = method, state
        if sliding_window is not None and k.shape[1] > sliding_window:
            right = 0 if causal else sliding_window
            left = sliding_window - 1 if causal else sliding_window
            chosen, remembered = as_method(f"window:left={left},right={right}"), None
        return attention(
            q,
            k,
            v,
            chosen,
            causal=causal,
            scale=scaling,
            layout="BNHD",
            softcap=softcap or 0.0,
            sink_logits=s_aux,
            state=remembered,
            layer=layer,
            n_layers=layers,
        )

    if attention_mask is None:
        return call(q, k, v), None
    if attention_mask.dtype == torch.int32:
        return _attend_packed(call, q, k, v, attention_mask), None
    return _attend_padded(call, q, k, v, attention_mask, causal), None


def register_as(name: str, method: MethodChoice, decode: MethodChoice | None = None) -> str:
    """Makes `name` an attention implementation.

    Args:
        method: of prefill, and of decoding where it supports that: a SPEC, a `tessera.Method`, a list with one per
            layer, or a dict from layers to methods: {"0-1": "dense", "2-": "xattention:tau=0.9"}.
        decode: of decoding, likewise; Error at the first call where it does not support it.
    """
    if not name.startswith(PREFIX):
        raise Error(f"name is {name!r}; expected one that starts with {PREFIX}")  # others have a meaning to Transformers
    for choice in (method, decode):
        values = choice.values() if isinstance(choice, Mapping) else [] if isinstance(choice, str | Method) else choice or []
        for one in [choice] if isinstance(choice, str | Method) else values:
            as_method(one)  # a wrong name is found here
    implementation = _Implementation(method, decode)

    def forward(module: Any, *arguments: Any, **options: Any) -> tuple[Tensor, None]:
        return attend(implementation, module, *arguments, **options)

    forward.__name__ = name
    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, attention_mask)
    return name


def register(prefix: str = PREFIX) -> dict[str, str]:
    """Makes every method of `supported_methods()` an attention implementation; returns {implementation: method}."""
    return {register_as(implementation_name(name, prefix), name): name for name in supported_methods()}
