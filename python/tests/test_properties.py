"""Any shape, strides and dtype against the float64 oracle."""

import ml_dtypes
import numpy as np
import oracle
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tessera

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def strided(array, how, rng):
    """The same numbers in another place: rows stay contiguous."""
    if how == "contiguous":
        return array
    if how == "bnhd":  # heads inside tokens
        return np.ascontiguousarray(array.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    if how == "sliced":
        b, h, n, d = array.shape
        wide = rng.standard_normal((b, h + 1, 2 * n + 1, d + 3)).astype(array.dtype)
        view = wide[:, 1:, 1 : 2 * n + 1 : 2, 2 : d + 2]
        view[...] = array
        return view
    reversed_tokens = np.ascontiguousarray(array[:, :, ::-1])
    return reversed_tokens[:, :, ::-1]


@st.composite
def calls(draw):
    kv_heads = draw(st.integers(1, 3))
    kv_len = draw(st.integers(1, 150))
    return {
        "batch": draw(st.integers(1, 2)),
        "kv_heads": kv_heads,
        "q_heads": kv_heads * draw(st.integers(1, 4)),
        "kv_len": kv_len,
        "q_len": draw(st.one_of(st.just(kv_len), st.integers(1, 150))),
        "head_dim": draw(st.integers(1, 96)),
        "value_dim": draw(st.integers(1, 96)),
        "causal": draw(st.booleans()),
        "dtype": draw(st.sampled_from(sorted(DTYPES))),
        "strides": draw(st.sampled_from(["contiguous", "bnhd", "sliced", "reversed"])),
        "torch": draw(st.booleans()),
        "layout": draw(st.sampled_from(["BHND", "BNHD"])),
        "softcap": draw(st.sampled_from([0.0, 5.0])),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


def as_tensor(array):
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_array(x):
    x = x.float().numpy() if isinstance(x, torch.Tensor) else x
    return np.asarray(x, np.float64)


@settings(max_examples=120)
@given(calls())
def test_dense_equals_the_oracle(call):
    rng = np.random.default_rng(call["seed"])
    lengths = {"q": call["q_len"], "k": call["kv_len"], "v": call["kv_len"]}
    heads = {"q": call["q_heads"], "k": call["kv_heads"], "v": call["kv_heads"]}
    dims = {"q": call["head_dim"], "k": call["head_dim"], "v": call["value_dim"]}
    plain, given_arrays = {}, {}
    for name in "qkv":
        shape = (call["batch"], heads[name], lengths[name], dims[name])
        plain[name] = rng.standard_normal(shape).astype(DTYPES[call["dtype"]])
        x = strided(plain[name], call["strides"], rng)
        if call["torch"] and call["strides"] != "reversed":  # tensors have no negative strides
            x = as_tensor(x)
        if call["layout"] == "BNHD":
            x = x.transpose(1, 2) if isinstance(x, torch.Tensor) else x.transpose(0, 2, 1, 3)
        given_arrays[name] = x
    o, lse = tessera.attention(
        *given_arrays.values(), causal=call["causal"], layout=call["layout"], softcap=call["softcap"], return_lse=True
    )
    assert type(o) is type(given_arrays["q"])
    assert o.dtype == given_arrays["q"].dtype
    mask = oracle.allowed(call["q_len"], call["kv_len"], call["causal"])
    expected, expected_lse = oracle.attention(*plain.values(), mask, softcap=call["softcap"])
    if call["layout"] == "BNHD":
        expected = expected.transpose(0, 2, 1, 3)
    limit = oracle.tolerance(call["dtype"], call["kv_len"]) * max(1, np.abs(as_array(plain["v"])).max())
    assert as_array(o).shape == expected.shape
    np.testing.assert_allclose(as_array(o), expected, atol=limit, rtol=0)
    lse = as_array(lse)
    seen = np.isfinite(expected_lse)
    assert (np.isneginf(lse) == ~seen).all()
    np.testing.assert_allclose(lse[seen], expected_lse[seen], atol=2e-4, rtol=2e-6)


@settings(max_examples=60)
@given(
    heads=st.integers(1, 3),
    q_len=st.integers(1, 90),
    kv_len=st.integers(1, 90),
    density=st.floats(0, 1),
    tile_q=st.sampled_from([1, 7, 16, 64]),
    tile_k=st.sampled_from([16, 32, 64]),
    causal=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_mask_as_a_plan(heads, q_len, kv_len, density, tile_q, tile_k, causal, seed):
    rng = np.random.default_rng(seed)
    problem = tessera.Problem(q_heads=heads, kv_heads=1, q_len=q_len, kv_len=kv_len, head_dim=16, causal=causal)
    mask = (rng.random((1, heads, q_len, kv_len)) < density) & oracle.allowed(q_len, kv_len, causal)
    plan = tessera.Plan.from_mask(problem, mask, tile_q=tile_q, tile_k=tile_k)
    plan.validate()
    assert (plan.to_mask() == mask).all()
    assert ((~plan).to_mask() == (oracle.allowed(q_len, kv_len, causal) & ~mask)).all()
    statistics = plan.statistics()
    assert statistics.planned_pairs == mask.sum()
    assert statistics.allowed_pairs == heads * oracle.allowed(q_len, kv_len, causal).sum()
    q = rng.standard_normal((1, heads, q_len, 16)).astype(np.float32)
    k, v = (rng.standard_normal((1, 1, kv_len, 16)).astype(np.float32) for _ in range(2))
    o, lse = tessera.run(plan, q, k, v, return_lse=True)
    expected, expected_lse = oracle.attention(q, k, v, mask)
    np.testing.assert_allclose(o, expected, atol=2e-5)
    assert (np.isneginf(lse) == ~mask.any(-1)).all()
    np.testing.assert_allclose(lse[mask.any(-1)], expected_lse[mask.any(-1)], atol=1e-4)


@settings(max_examples=40)
@given(
    left=st.integers(1, 80), right=st.integers(1, 80), n=st.integers(1, 80), seed=st.integers(0, 2**32 - 1)
)
def test_set_operations_are_those_of_masks(left, right, n, seed):
    rng = np.random.default_rng(seed)
    problem = tessera.Problem(q_heads=2, kv_heads=1, q_len=n, kv_len=n, head_dim=8, causal=True)
    a_mask, b_mask = (
        (rng.random((1, 2, n, n)) < share / 80) & oracle.allowed(n, n, True) for share in (left, right)
    )
    a, b = (tessera.Plan.from_mask(problem, mask, 16, 16) for mask in (a_mask, b_mask))
    assert ((a | b).to_mask() == (a_mask | b_mask)).all()
    assert ((a & b).to_mask() == (a_mask & b_mask)).all()
    if b_mask.any():
        assert abs(a.coverage(b) - (a_mask & b_mask).sum() / b_mask.sum()) < 1e-12
    assert (a | ~a) == (a | ~a)
    assert ((a | ~a).to_mask() == oracle.allowed(n, n, True)).all()
