"""Attention in NumPy float64, pair by pair."""

import numpy as np


def allowed(q_len, kv_len, causal, q_offset=None):
    """bool [q_len, kv_len]"""
    if not causal:
        return np.ones((q_len, kv_len), bool)
    first = kv_len - q_len if q_offset is None else q_offset
    return np.arange(kv_len)[None, :] <= first + np.arange(q_len)[:, None]


def attention(q, k, v, mask, scale=None, softcap=0.0, sink_logits=None, alibi=None, key_bias=None):
    """(o, lse) of [B, H, N, D] arrays; mask broadcasts to [B, Hq, Nq, Nk]. Rows without keys: 0 and -inf."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat(group, axis=1), v.repeat(group, axis=1)
    s = (q @ k.swapaxes(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        s = softcap * np.tanh(s / softcap)
    if alibi is not None:
        first = k.shape[2] - q.shape[2]
        distance = np.arange(k.shape[2])[None, :] - (first + np.arange(q.shape[2])[:, None])
        s = s + np.asarray(alibi, np.float64)[:, None, None] * distance
    if key_bias is not None:
        s = s + np.asarray(key_bias, np.float64)[..., None, :]
    s = np.where(mask, s, -np.inf)
    top = s.max(-1, initial=-np.inf, keepdims=True)
    if sink_logits is not None:
        sinks = np.asarray(sink_logits, np.float64)[:, None, None]
        top = np.maximum(top, sinks)
    top = np.where(np.isfinite(top), top, 0)
    p = np.exp(s - top)
    total = p.sum(-1, keepdims=True)
    if sink_logits is not None:
        total = total + np.exp(sinks - top)
    with np.errstate(divide="ignore", invalid="ignore"):
        o = np.where(total > 0, (p @ v) / total, 0)
        lse = (top + np.log(total))[..., 0]
    return o, lse


def tolerance(dtype, kv_len):
    """Of outputs of inputs of order 1: rounding of the dtype, and of float32 sums."""
    unit = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    return 4 * unit + 2e-6 * (1 + np.log2(kv_len + 1))
