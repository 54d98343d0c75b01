"""Methods in transformers of Diffusers, small and with random weights."""

import pytest
import torch

import tessera

diffusers = pytest.importorskip("diffusers")
from tessera.integrations import diffusers as integration  # noqa: E402


def wan():
    torch.manual_seed(1)
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
        ffn_dim=48, num_layers=2, patch_size=(1, 2, 2), rope_max_seq_len=32,
    )  # fmt: skip
    latents = torch.randn(1, 4, 3, 16, 16)
    call = lambda: model(latents, torch.tensor([500]), torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(2)), return_dict=False)[0]  # noqa: E731, E501
    return model.eval(), latents, call, {}, 2


def flux():
    torch.manual_seed(1)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    latents = torch.randn(1, 4, 12, 16)
    tokens = torch.randn(1, 12 * 16, 8)
    places = torch.stack(torch.meshgrid(torch.zeros(1), torch.arange(12.0), torch.arange(16.0), indexing="ij"), -1)
    text = torch.randn(1, 6, 12)
    call = lambda: model(  # noqa: E731
        hidden_states=tokens, encoder_hidden_states=text, pooled_projections=torch.ones(1, 10), timestep=torch.ones(1),
        img_ids=places.reshape(-1, 3), txt_ids=torch.zeros(6, 3), return_dict=False,
    )[0]  # fmt: skip
    return model.eval(), latents, call, {"prefix": 6}, 2


def cogvideo():
    torch.manual_seed(1)
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=12,
        num_layers=2, sample_width=16, sample_height=16, sample_frames=9, patch_size=2, max_text_seq_length=6,
    )  # fmt: skip
    latents = torch.randn(1, 3, 4, 16, 16)
    text = torch.randn(1, 6, 12)
    call = lambda: model(latents, text, torch.tensor([500]), return_dict=False)[0]  # noqa: E731
    return model.eval(), latents.transpose(1, 2), call, {"prefix": 6}, 2


def hunyuan():
    torch.manual_seed(1)
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=2, patch_size_t=1, text_embed_dim=12, pooled_projection_dim=10, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    latents = torch.randn(1, 4, 3, 16, 16)
    text, mask = torch.randn(1, 9, 12), torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0, 0]])
    call = lambda: model(  # noqa: E731
        hidden_states=latents, timestep=torch.tensor([500]), encoder_hidden_states=text, encoder_attention_mask=mask,
        pooled_projections=torch.ones(1, 10), guidance=torch.tensor([6000.0]), return_dict=False,
    )[0]  # fmt: skip
    return model.eval(), latents, call, {"suffix": 9}, 2


MODELS = {"wan": wan, "flux": flux, "cogvideo": cogvideo, "hunyuan": hunyuan}


@pytest.fixture(params=sorted(MODELS))
def case(request):
    return MODELS[request.param]()


@torch.no_grad()
def test_dense_equals_the_model(case):
    model, latents, call, text, layers = case
    expected = call()
    grid = integration.grid_of(model, latents.shape, **text)
    with integration.attention("dense", grid=grid, n_layers=layers) as use:
        found = call()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    assert use.calls == layers
    torch.testing.assert_close(call(), expected)  # and afterwards the model is as before


@torch.no_grad()
def test_the_grid_reaches_the_method(case):
    """Neighbourhoods are defined on the grid alone."""
    model, latents, call, text, layers = case
    expected = call()
    grid = integration.grid_of(model, latents.shape, **text)
    with integration.attention("gna", grid=grid, window="1x3x3", stride="1") as use:
        narrow = call()
    assert use.calls == layers
    assert (narrow - expected).abs().max() > 1e-4
    whole = "x".join(str(n) for n in grid.extent)
    with integration.attention(f"gna:window={whole},stride=1", grid=grid):
        torch.testing.assert_close(call(), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("method", ["sla", "pisa", "psa", "draft", "sparge", "xattention"])
@torch.no_grad()
def test_methods_run(method):
    if not tessera.methods()[method].bidirectional:
        pytest.skip("causal only")
    model, latents, call, _, _ = wan()
    with integration.attention(method, grid=integration.grid_of(model, latents.shape)) as use:
        assert torch.isfinite(call()).all()
    assert use.calls == 2 and use.others == 2  # cross-attention to the text


def test_training_through_it():
    model, latents, call, _, _ = wan()
    with integration.attention("sla", grid=integration.grid_of(model, latents.shape)):
        call().square().mean().backward()
    assert model.blocks[0].attn1.to_q.weight.grad.abs().max() > 0


def test_grids_of_models():
    model, latents, _, _, _ = wan()
    assert list(integration.grid_of(model, latents.shape).extent) == [3, 8, 8]
    with pytest.raises(tessera.Error, match="no multiple of the patches"):
        integration.grid_of(model, (1, 4, 3, 15, 16))


def test_masks():
    q = torch.randn(2, 10, 2, 8)
    mask = torch.ones(2, 1, 1, 10, dtype=torch.bool)
    mask[1, ..., 6:] = False
    use = integration.Use(tessera.Method("dense"), None, 1, None)
    o = integration.attend(use, q, q, q, mask, False, None)
    expected = torch.nn.functional.scaled_dot_product_attention(*(q.transpose(1, 2),) * 3, attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(o[0], expected[0])
    torch.testing.assert_close(o[1, :6], expected[1, :6])
    mask[1, ..., 2] = False  # a hole: left to PyTorch, unless the call is one over the grid
    expected = torch.nn.functional.scaled_dot_product_attention(*(q.transpose(1, 2),) * 3, attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(integration.attend(use, q, q, q, mask, False, None), expected)
    use.grid = tessera.TokenGrid([1, 2, 5])
    with pytest.raises(tessera.Error, match="attn_mask of the grid's tokens"):
        integration.attend(use, q, q, q, mask, False, None)
