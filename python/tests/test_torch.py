"""Registered operators, gradients, compilation, modules."""

import pytest
import torch

import tessera
import tessera.torch as tt


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(7)
    make = lambda heads, dim: torch.randn(2, heads, 130, dim, generator=generator)  # noqa: E731
    return make(4, 32).requires_grad_(), make(2, 32).requires_grad_(), make(2, 16).requires_grad_()


def reference(q, k, v, mask, scale=None):
    """Attention of PyTorch in float64; q, k, v are leaves of their own."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    o = torch.nn.functional.scaled_dot_product_attention(*leaves, attn_mask=mask, scale=scale, enable_gqa=True)
    return leaves, o


def gradients(o, leaves, d_o):
    return torch.autograd.grad(o, leaves, d_o.to(o.dtype))


@pytest.mark.parametrize("method", ["dense", "streaming:n_init=16,n_local=32", "moba:block_size=32,top_k=2"])
@pytest.mark.parametrize("layout", ["BHND", "BNHD"])
def test_gradients(tensors, method, layout):
    given = [x if layout == "BHND" else x.transpose(1, 2) for x in tensors]
    o, lse = tessera.attention(*given, method, causal=True, layout=layout, return_lse=True)
    assert o.requires_grad and lse.requires_grad
    mask = torch.from_numpy(tessera.plan(*[x.detach() for x in tensors], method, causal=True).to_mask())
    leaves, expected = reference(*tensors, mask)
    d_o = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    found = gradients(o if layout == "BHND" else o.transpose(1, 2), tensors, d_o)
    for a, b in zip(found, gradients(expected, leaves, d_o), strict=True):
        torch.testing.assert_close(a, b.float(), atol=2e-5, rtol=1e-4)


def test_gradient_of_the_lse(tensors):
    q, k, v = tensors
    _, lse = tessera.attention(q, k, v, causal=True, return_lse=True)
    d_lse = torch.randn(lse.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(lse, (q, k), d_lse)
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k.repeat_interleave(2, 1)) * 32**-0.5
    expected = torch.logsumexp(scores.masked_fill(~torch.ones(130, 130).tril().bool(), -torch.inf), -1)
    for a, b in zip(found, torch.autograd.grad(expected, (q, k), d_lse), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_gradients_of_modifiers(tensors):
    q, k, v = tensors
    sinks = torch.randn(4, requires_grad=True)
    bias = torch.randn(1, 4, 130, requires_grad=True)
    o = tessera.attention(q, k, v, causal=True, sink_logits=sinks, key_bias=bias, softcap=6.0)
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k.repeat_interleave(2, 1)) * 32**-0.5
    scores = 6 * torch.tanh(scores / 6) + bias[:, :, None]
    scores = scores.masked_fill(~torch.ones(130, 130).tril().bool(), -torch.inf)
    column = sinks[None, :, None, None].expand(2, 4, 130, 1)
    p = torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]
    expected = p @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(o, expected, atol=2e-5, rtol=1e-4)
    d_o = torch.randn(o.shape)
    leaves = (q, k, v, sinks, bias)
    for a, b in zip(gradients(o, leaves, d_o), gradients(expected, leaves, d_o), strict=True):
        torch.testing.assert_close(a, b, atol=5e-5, rtol=1e-3)


def test_gradients_of_a_plan(tensors):
    q, k, v = tensors
    plan = tessera.plan(q.detach(), k.detach(), v.detach(), "streaming", n_init=16, n_local=32, causal=True)
    o = tessera.run(plan, q, k, v)
    mask = torch.from_numpy(plan.to_mask())
    number = id(plan._native)
    del plan  # the graph keeps it
    leaves, expected = reference(q, k, v, mask)
    d_o = torch.randn(o.shape)
    for a, b in zip(gradients(o, tensors, d_o), gradients(expected, leaves, d_o), strict=True):
        torch.testing.assert_close(a, b.float(), atol=2e-5, rtol=1e-4)
    del o
    with pytest.raises(tessera.Error, match="is gone"):
        tt._plan_of(number)


def test_packed_sequences_have_gradients(tensors):
    q, k, v = (x[0].transpose(0, 1) for x in tensors)
    o = tessera.attention(q, k, v, causal=True, layout="NHD", cu_seqlens_q=[0, 30, 130])
    d_o = torch.randn(o.shape)
    found = gradients(o, tensors, d_o)
    parts = [
        tessera.attention(*(x[begin:end] for x in (q, k, v)), causal=True, layout="NHD") for begin, end in ((0, 30), (30, 130))
    ]
    for a, b in zip(found, gradients(torch.cat(parts), tensors, d_o), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_half_precision(tensors, dtype):
    low = [x.detach().to(dtype).requires_grad_() for x in tensors]
    o = tessera.attention(*low, causal=True)
    assert o.dtype == dtype
    leaves, expected = reference(*low, torch.ones(130, 130).tril().bool())
    d_o = torch.randn(o.shape).to(dtype)
    for a, b in zip(gradients(o, low, d_o), gradients(expected, leaves, d_o), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, atol=0.05, rtol=0.03)


def test_methods_without_backward_say_so(tensors):
    o = tessera.attention(*tensors, "flexprefill", causal=True)
    with pytest.raises(tessera.Error, match="flexprefill"):
        o.sum().backward()


@pytest.mark.parametrize("choice", [dict(backend="reference"), dict(isa="portable")])
def test_choices_without_gradients_are_not_dropped_silently(tensors, choice):
    with pytest.raises(tessera.Error, match="without gradients"):
        tessera.attention(*tensors, **choice)
    plan = tessera.plan(*(x.detach() for x in tensors), causal=True)
    with pytest.raises(tessera.Error, match="without gradients"):
        tessera.run(plan, *tensors, **choice)
    assert tessera.attention(*(x.detach() for x in tensors), **choice).shape == tensors[0].shape[:3] + tensors[2].shape[3:]


def test_no_graph_without_gradients(tensors):
    with torch.no_grad():
        o = tessera.attention(*tensors, causal=True)
    assert not o.requires_grad
    torch.testing.assert_close(o, tessera.attention(*(x.detach() for x in tensors), causal=True))


def operator_arguments(q, k, v, method="dense", side=None, **call):
    side = side or {}
    text = tt._call_text(call.get("causal", True), None, None, None, None, None)
    description = tessera.Method(method).description
    return (q, k, v, list(side.values()), None, None, None, description, ",".join(side), text, 0.0, 0, 1, 0, False)


@pytest.mark.parametrize("method", ["dense", "moba:block_size=32,top_k=2"])
def test_opcheck_of_attention(tensors, method):
    torch.library.opcheck(torch.ops.tessera.attention.default, operator_arguments(*tensors, method))


def test_opcheck_with_side_inputs(tensors):
    gate = torch.randn(2, 4, 130, 16, requires_grad=True)
    torch.library.opcheck(torch.ops.tessera.attention.default, operator_arguments(*tensors, "gated", {"gate": gate}))


def test_opcheck_with_strides(tensors):
    q, k, v = (x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in tensors)
    arguments = operator_arguments(q, k, v)[:-1] + (True,)
    torch.library.opcheck(torch.ops.tessera.attention.default, arguments)


def test_opcheck_of_plans(tensors):
    plan = tessera.plan(*(x.detach() for x in tensors), "streaming", causal=True)
    arguments = (*tensors, None, None, None, tt._number_of(plan), 0.0, 0, False)
    torch.library.opcheck(torch.ops.tessera.run_plan.default, arguments)


class Layer(torch.nn.Module):
    def __init__(self, method):
        super().__init__()
        self.project = torch.nn.Linear(64, 3 * 64)
        self.method = method

    def forward(self, x):
        q, k, v = self.project(x).unflatten(-1, (3, 4, 16)).unbind(2)
        return tessera.attention(q, k, v, self.method, causal=True, layout="BNHD").flatten(2)


@pytest.mark.parametrize("method", ["dense", "streaming:n_init=16,n_local=32"])
def test_compiles_in_one_graph(method):
    torch.manual_seed(3)
    layer = Layer(method)
    x = torch.randn(2, 96, 64)
    expected = layer(x)
    d = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, list(layer.parameters()), d)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    o = compiled(x)
    torch.testing.assert_close(o, expected)
    for a, b in zip(torch.autograd.grad(o, list(layer.parameters()), d), wanted, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(compiled(x[:, :50]), layer(x[:, :50]))  # another length


def test_exports():
    layer = Layer("streaming").eval()
    x = torch.randn(1, 64, 64)
    program = torch.export.export(layer, (x,))
    assert any("tessera.attention" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), layer(x))


def numeric(loss, parameter, index, step=1e-2):
    """Central difference of a loss in one element."""
    with torch.no_grad():
        flat = parameter.view(-1)
        before = flat[index].item()
        values = []
        for sign in (1, -1):
            flat[index] = before + sign * step
            values.append(loss().double().item())
        flat[index] = before
    return (values[0] - values[1]) / (2 * step)


def check_parameters(module, loss):
    loss().backward()
    torch.manual_seed(5)
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        best = parameter.grad.abs().flatten().argmax()
        expected = numeric(loss, parameter, best)
        assert abs(parameter.grad.view(-1)[best].item() - expected) <= 0.03 * abs(expected) + 2e-3, name


@pytest.fixture
def plain(tensors):
    return [x.detach() for x in tensors]


@pytest.mark.parametrize("per_head", [False, True])
def test_gated_attention_learns(plain, per_head):
    torch.manual_seed(1)
    x, target = torch.randn(2, 130, 24), torch.randn(2, 4, 130, 16)
    module = tt.GatedAttention(24, 4, 16, per_head=per_head)
    check_parameters(module, lambda: ((module(x, *plain) - target) ** 2).sum() / 100)


@pytest.mark.parametrize("compress", ["mean", "pool", "linear", "mlp"])
def test_nsa_learns(plain, compress):
    torch.manual_seed(1)
    x, target = torch.randn(2, 130, 24), torch.randn(2, 4, 130, 16)
    module = tt.NSA(24, 4, 2, 32, 16, compress=compress, length=16, stride=8, block_size=16, top_k=8, window=32)
    check_parameters(module, lambda: ((module(x, *plain) - target) ** 2).sum() / 100)


def test_sla_learns(plain):
    torch.manual_seed(1)
    target = torch.randn(2, 4, 130, 16)
    module = tt.SLA(16, block_q=16, block_k=16, critical=0.3)
    check_parameters(module, lambda: ((module(*plain) - target) ** 2).sum() / 100)


def test_moba_is_a_module(tensors):
    module = tt.MoBA(block_size=32, top_k=2)
    assert "block_size=32" in repr(module)
    module(*tensors).sum().backward()
    assert tensors[0].grad is not None


def test_training_a_layer_lowers_its_loss():
    torch.manual_seed(2)
    layer = Layer("moba:block_size=16,top_k=2")
    x, target = torch.randn(2, 64, 64), torch.randn(2, 64, 64) * 0.1
    optimiser = torch.optim.Adam(layer.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        loss = ((layer(x) - target) ** 2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
