"""The functions: arguments, results, errors."""

import ml_dtypes
import numpy as np
import oracle
import pytest
import torch

import tessera


def test_methods_describe_themselves():
    known = tessera.methods()
    assert {"dense", "xattention", "nsa", "kda"} <= set(known)
    tau = {p.name: p for p in known["xattention"].parameters}["tau"]
    assert tau.type == "float" and isinstance(tau.default, float) and tau.minimum == 0 and tau.maximum == 1
    assert not known["kda"].has_plan and known["snapkv"].own_cache
    assert [side.name for side in known["gated"].side_inputs] == ["gate"]
    assert "xattention" in known["xattention"]._repr_html_()


def test_a_method_holds_its_parameters():
    method = tessera.Method("xattention:block=64", tau=np.float32(0.5))
    assert method.name == "xattention"
    assert method.parameters["tau"] == 0.5 and method.parameters["block"] == 64
    assert "tau=0.5" in repr(method) and "stride" not in repr(method)


def test_a_file_gives_each_layer_its_method(tmp_path, qkv):
    path = tmp_path / "layers.json"
    path.write_text(
        '{"layers": [{"layers": "0", "method": "dense"}, {"layers": "1-", "method": "streaming",'
        ' "parameters": {"n_init": 16, "n_local": 32}}]}'
    )
    densities = [
        tessera.plan(*qkv, str(path), causal=True, layer=layer, n_layers=3).density for layer in range(3)
    ]
    assert densities[0] == 1 and densities[1] == densities[2] < 1


@pytest.mark.parametrize("method", ["streaming:n_init=16,n_local=32", "xattention:tau=0.7,block=32,stride=8", "moba:block_size=32"])
def test_attention_is_its_plan(qkv, method):
    q, k, v = qkv
    o, lse, plan = tessera.attention(q, k, v, method, causal=True, return_lse=True, return_plan=True)
    mask = plan.to_mask()
    assert 0 < mask.mean() < oracle.allowed(300, 300, True).mean()
    expected, expected_lse = oracle.attention(q, k, v, mask)
    np.testing.assert_allclose(o, expected, atol=2e-5)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-4)
    assert tessera.plan(q, k, v, method, causal=True) == plan
    again, report = tessera.run(plan, q, k, v, return_report=True)
    np.testing.assert_array_equal(again, o)
    assert report.isa == tessera.default_isa() and report.kernel_ms > 0


def test_parameters_as_keywords(qkv):
    q, k, _ = qkv
    plan = tessera.plan(q, k, method="streaming", causal=True, n_init=16, n_local=32)
    assert plan == tessera.plan(q, k, method="streaming:n_init=16,n_local=32", causal=True)
    assert plan.problem.value_dim == 64


@pytest.mark.parametrize("isa", tessera.supported_isas())
@pytest.mark.parametrize("backend", ["reference", "query-major", "key-major", "split-key"])
def test_every_backend(qkv, isa, backend):
    q, k, v = qkv
    plan = tessera.plan(q, k, v, "xattention", tau=0.7, block=32, stride=8, causal=True)
    o, report = tessera.run(plan, q, k, v, backend=backend, isa=isa, return_report=True)
    assert report.kernel == backend
    np.testing.assert_allclose(o, oracle.attention(q, k, v, plan.to_mask())[0], atol=2e-5)


def test_threads_do_not_change_results(qkv):
    one, two, five = (tessera.attention(*qkv, "xattention", causal=True, threads=n) for n in (1, 2, 5))
    assert (one == two).all() and (one == five).all()


def test_modifiers(qkv, rng):
    q, k, v = qkv
    sinks, slopes = rng.standard_normal(4), rng.random(4) * 0.1
    bias = rng.standard_normal((2, 4, 300))
    o, lse = tessera.attention(
        q, k, v, causal=True, scale=0.3, softcap=4.0, sink_logits=sinks, alibi_slopes=slopes, key_bias=bias, return_lse=True
    )
    expected, expected_lse = oracle.attention(
        q, k, v, oracle.allowed(300, 300, True), 0.3, 4.0, sinks, slopes, bias
    )
    np.testing.assert_allclose(o, expected, atol=3e-5)
    np.testing.assert_allclose(lse, expected_lse, atol=2e-4)
    per_key = tessera.attention(q, k, v, key_bias=bias[0, 0])
    np.testing.assert_allclose(
        per_key, oracle.attention(q, k, v, oracle.allowed(300, 300, False), key_bias=bias[:1, :1])[0], atol=2e-5
    )


def test_offset_of_the_queries(qkv):
    q, k, v = qkv
    o = tessera.attention(q[:, :, :10], k, v, causal=True, q_offset=100)
    np.testing.assert_allclose(o, oracle.attention(q[:, :, :10], k, v, oracle.allowed(10, 300, True, 100))[0], atol=2e-5)


def test_packed_sequences(rng):
    lengths = [0, 5, 5, 130, 201]
    q, k = (rng.standard_normal((201, heads, 32)).astype(np.float32) for heads in (4, 2))
    o, lse = tessera.attention(q, k, k, causal=True, layout="NHD", cu_seqlens_q=lengths, return_lse=True)
    assert o.shape == q.shape and lse.shape == (4, 201)
    for begin, end in zip(lengths[:-1], lengths[1:], strict=True):
        if begin == end:
            continue
        part = [x[begin:end].transpose(1, 0, 2)[None] for x in (q, k, k)]
        expected, expected_lse = oracle.attention(*part, oracle.allowed(end - begin, end - begin, True))
        np.testing.assert_allclose(o[begin:end].transpose(1, 0, 2), expected[0], atol=2e-5)
        np.testing.assert_allclose(lse[:, begin:end], expected_lse[0], atol=1e-4)
    tensors = [torch.from_numpy(x) for x in (q, k, k)]
    same = tessera.attention(*tensors, causal=True, layout="NHD", cu_seqlens_q=torch.tensor(lengths))
    np.testing.assert_array_equal(same.numpy(), o)


def test_without_a_batch_axis(qkv):
    q, k, v = qkv
    o, lse = tessera.attention(q[0], k[0], v[0], causal=True, layout="HND", return_lse=True)
    whole, whole_lse = tessera.attention(q, k, v, causal=True, return_lse=True)
    np.testing.assert_array_equal(o, whole[0])
    np.testing.assert_array_equal(lse, whole_lse[0])


def test_keys_in_pages(qkv, rng):
    q, k, v = qkv
    page = 16
    table = rng.permutation(2 * 19).astype(np.int32).reshape(2, 19)
    pools = []
    for x in (k, v):
        padded = np.concatenate([x, np.full((2, 2, 19 * page - 300, x.shape[3]), np.nan, np.float32)], axis=2)
        pool = np.empty((38, 2, page, x.shape[3]), np.float32)
        for b in range(2):
            for i, number in enumerate(table[b]):
                pool[number] = padded[b, :, i * page : (i + 1) * page]
        pools.append(pool)
    plan = tessera.plan(q[:, :, -1:], k, v, causal=True)
    o = tessera.run(plan, q[:, :, -1:], *pools, page_table=table, page_size=page)
    np.testing.assert_allclose(o, tessera.run(plan, q[:, :, -1:], k, v), atol=1e-6)


def test_grids(rng):
    q = rng.standard_normal((1, 2, 4 * 6 * 8 + 5, 16)).astype(np.float32)
    grid = tessera.TokenGrid([4, 6, 8], prefix=5)
    plan = tessera.plan(q, q, q, "gna", window="3x3x3", stride="1", grid=grid)
    assert plan.problem.grid == grid and plan.density < 1
    with pytest.raises(tessera.Error, match="grid"):
        tessera.plan(q, q, q, "gna", grid=(4, 6, 8))
    with pytest.raises(tessera.Error, match="grid is 'axb'"):
        tessera.plan(q, q, q, "gna", grid="axb")


def test_side_inputs(qkv, rng):
    q, k, v = qkv
    gate = rng.standard_normal((2, 4, 300, 32)).astype(np.float32)
    o = tessera.attention(q, k, v, "gated", causal=True, side={"gate": gate})
    dense = tessera.attention(q, k, v, causal=True)
    np.testing.assert_allclose(o, dense / (1 + np.exp(-gate)), atol=1e-5)
    with pytest.raises(tessera.Error, match="gate"):
        tessera.attention(q, k, v, "gated", causal=True)


def test_state_lives_across_calls(qkv):
    method = tessera.Method("tidaldecode")
    state = method.new_state()
    assert state is not None
    q, k, v = qkv
    for layer in range(4):
        o = tessera.attention(q[:, :, -1:], k, v, method, causal=True, state=state, layer=layer, n_layers=4)
        assert np.isfinite(o).all()
    assert tessera.Method("dense").new_state() is None


def test_out(qkv):
    q, k, v = qkv
    out = np.empty((2, 4, 300, 32), np.float32)
    assert tessera.attention(q, k, v, out=out) is out
    np.testing.assert_array_equal(out, tessera.attention(q, k, v))
    wide = np.zeros((2, 300, 4, 40), np.float16)
    tessera.attention(q, k, v, out=wide.transpose(0, 2, 1, 3)[..., 4:36])
    np.testing.assert_array_equal(wide[..., 4:36].transpose(0, 2, 1, 3), out.astype(np.float16))
    assert (wide[..., :4] == 0).all() and (wide[..., 36:] == 0).all()
    tensor = torch.empty(2, 4, 300, 32, dtype=torch.bfloat16)
    assert tessera.attention(q, k, v, out=tensor) is tensor
    np.testing.assert_allclose(tensor.float().numpy(), out, atol=0.02)
    frozen = out.copy()
    frozen.flags.writeable = False
    for bad, message in [
        (out[:, :, :5], "out has shape"),
        (out.astype(np.float64), "out has dtype float64"),
        (frozen, "out is read-only"),
        (np.empty((2, 4, 300, 64), np.float32)[..., ::2], "out has rows that are not contiguous"),
        ([1.0], "shape|type"),
    ]:
        with pytest.raises((tessera.Error, AttributeError), match=message):
            tessera.attention(q, k, v, out=bad)


def test_rows_that_are_not_contiguous_are_copied(qkv):
    q, k, v = qkv
    apart = np.asfortranarray(q)
    np.testing.assert_array_equal(tessera.attention(apart, k, v), tessera.attention(q, k, v))
    tensor = torch.from_numpy(q).transpose(2, 3).contiguous().transpose(2, 3)
    assert tensor.stride(-1) != 1
    o = tessera.attention(tensor, torch.from_numpy(k), torch.from_numpy(v))
    np.testing.assert_array_equal(o.numpy(), tessera.attention(q, k, v))


def test_no_queries(qkv):
    q, k, v = qkv
    o, lse = tessera.attention(q[:, :, :0], k, v, causal=True, return_lse=True)
    assert o.shape == (2, 4, 0, 32) and lse.shape == (2, 4, 0)


def test_read_only_inputs(qkv):
    q, k, v = (x.copy() for x in qkv)
    for x in (q, k, v):
        x.flags.writeable = False
    assert tessera.attention(q, k, v).shape == (2, 4, 300, 32)


class Other:
    """An array of some other library."""

    def __init__(self, array):
        self.array = array
        self.shape, self.ndim = array.shape, array.ndim

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_other_arrays_with_dlpack(qkv):
    o = tessera.attention(*(Other(x) for x in qkv))
    assert isinstance(o, np.ndarray)
    np.testing.assert_array_equal(o, tessera.attention(*qkv))


def test_mixed_frameworks_and_dtypes(qkv):
    q, k, v = qkv
    half = [x.astype(ml_dtypes.bfloat16) for x in (k, v)]
    o = tessera.attention(torch.from_numpy(q), *half)
    assert o.dtype == torch.float32
    wide = [x.astype(np.float32) for x in half]
    np.testing.assert_allclose(o.numpy(), tessera.attention(q, *wide), atol=2e-3)


BAD = [
    (dict(method="xatention"), "did you mean 'xattention'"),
    (dict(method="xattention", tau=3), "tau=3 is outside"),
    (dict(method="xattention", taw=1), "did you mean 'tau'"),
    (dict(method=3), "method is of type int"),
    (dict(layout="BSHD"), "layout is 'BSHD'"),
    (dict(layout="HND"), "q has 4 axes"),
    (dict(backend="fast"), "backend is fast"),
    (dict(isa="sse9"), "sse9"),
    (dict(threads=-1), "threads is -1"),
    (dict(layer=3, n_layers=2), "layer is 3 of 2"),
    (dict(softcap=-1.0), "softcap is -1"),
    (dict(scale=float("nan")), "scale"),
    (dict(sink_logits=[1.0]), "sink_logits has 1 entries"),
    (dict(cu_seqlens_q=[0, 10]), "cu_seqlens|batch"),
    (dict(cu_seqlens_q=[0.0, 1.5]), "cu_seqlens_q has dtype float64"),
    (dict(cu_seqlens_k=[0, 300]), "without cu_seqlens_q"),
    (dict(side={"gate": "text"}), "side gate is of type str"),
    (dict(method="xattention", causal=False, tau=[1]), "tau|type"),
]


@pytest.mark.parametrize("arguments, message", BAD, ids=[message for _, message in BAD])
def test_mistakes_are_named(qkv, arguments, message):
    with pytest.raises(tessera.Error, match=message) as caught:
        tessera.attention(*qkv, **arguments)
    assert isinstance(caught.value, ValueError)


def test_mistakes_in_arrays_are_named(qkv):
    q, k, v = qkv
    for arrays, message in [
        ((q.astype(np.float64), k, v), "q has dtype f64"),
        ((q, k, v.astype(np.float16)), "k is f32 and v is f16"),
        ((q, k[:, :, :7], v), "v has shape"),
        ((q[:, :3], k, v), "q_heads|kv_heads"),
        ((q, k[..., :3], v), "k has head dim 3"),
        ((q.astype(">f4"), k, v), "q has dtype >f4"),
        (([[1.0]], k, v), "q is of type list"),
        ((torch.from_numpy(q).to("meta"), k, v), "q lies on meta"),
        ((torch.from_numpy(q).to_sparse(), k, v), "layout"),
        ((q > 0, k, v), "q has a dtype of code"),
    ]:
        with pytest.raises(tessera.Error, match=message):
            tessera.attention(*arrays)


def test_run_wants_the_problem_of_the_plan(qkv):
    q, k, v = qkv
    plan = tessera.plan(q, k, v, causal=True)
    with pytest.raises(tessera.Error, match="q has shape"):
        tessera.run(plan, q[:, :, 1:], k, v)
    with pytest.raises(tessera.Error, match="plan is of type str"):
        tessera.run("dense", q, k, v)


def test_backward_of_a_plan(qkv, rng):
    q, k, v = qkv
    plan = tessera.plan(q, k, v, "streaming", n_init=16, n_local=64, causal=True)
    o, lse = tessera.run(plan, q, k, v, return_lse=True)
    d_o = rng.standard_normal(o.shape).astype(np.float32)
    found = tessera.run_backward(plan, q, k, v, o, lse, d_o)
    tensors = [torch.from_numpy(x).double().requires_grad_() for x in (q, k, v)]
    mask = torch.from_numpy(plan.to_mask())
    reference = torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=mask, enable_gqa=True)
    reference.backward(torch.from_numpy(d_o).double())
    for gradient, tensor in zip(found, tensors, strict=True):
        np.testing.assert_allclose(gradient, tensor.grad.numpy(), atol=2e-5)
