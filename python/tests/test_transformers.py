"""Methods as attention implementations of Transformers, on small models with random weights."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    Gemma2Config,
    LlamaConfig,
    Phi3Config,
    Qwen3Config,
)

import tessera
from tessera.integrations import transformers as integration

NAMES = integration.register()
SIZES = dict(
    vocab_size=211,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
    "gemma2": Gemma2Config(**SIZES, head_dim=32, query_pre_attn_scalar=32, sliding_window=48, attn_logit_softcapping=3.0),
    "phi3": Phi3Config(**SIZES, sliding_window=60),
}


def model_of(family, implementation):
    torch.manual_seed(11)
    config = type(CONFIGS[family]).from_dict(CONFIGS[family].to_dict())
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():  # of the default initialisation attention is flat and says nothing about a method
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name or "qkv_proj" in name:
                weight.mul_(8)
    return model


def peer(family):
    """What dense attention should give: sdpa, but for Gemma 2, whose soft-cap sdpa lacks."""
    return model_of(family, "eager" if family == "gemma2" else "sdpa")


def prompt(batch=2, length=150):
    return torch.randint(3, 211, (batch, length), generator=torch.Generator().manual_seed(5))


@pytest.fixture(params=sorted(CONFIGS))
def family(request):
    return request.param


@torch.no_grad()
def logits(model, tokens, **options):
    return model(tokens, **options).logits


def test_names():
    assert NAMES["tessera_xattention"] == "xattention" and NAMES["tessera_tri_shape"] == "tri-shape"
    assert "tessera_gated" not in NAMES  # needs a gate


def test_dense_equals_sdpa(family):
    expected = logits(peer(family), prompt())
    found = logits(model_of(family, "tessera_dense"), prompt())
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert expected.std() > 0.1


FULL = {
    "xattention": "xattention:tau=1",
    "streaming": "streaming:n_init=64,n_local=4096",
    "moba": "moba:block_size=64,top_k=100",
    "oracle-topk": "oracle-topk:k=100000",
    "quest": "quest:budget=100000",
    "flexprefill": "flexprefill:gamma=1",
    "minference": "minference:v=4096,sl=4096",
    "nsa": None,
}


@pytest.mark.parametrize("method", [method for method, spec in FULL.items() if spec])
def test_full_budget_equals_sdpa(family, method):
    name = integration.register_as(f"tessera_full_{method}", FULL[method])
    torch.testing.assert_close(
        logits(model_of(family, name), prompt()), logits(peer(family), prompt()), atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_method_runs_a_model_and_generates(name):
    model = model_of("llama", name)
    tokens = prompt(1, 200)
    assert torch.isfinite(logits(model, tokens)).all()
    text = model.generate(tokens, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert text.shape == (1, 203)


def test_a_sparse_method_is_sparse():
    """Only the last 32 tokens and the first 16 matter: changing others changes nothing, which it does in sdpa."""
    name = integration.register_as("tessera_narrow", "streaming:n_init=16,n_local=32")
    tokens = prompt(1, 200)
    other = tokens.clone()
    other[0, 20:60] = 7  # three layers reach 3 x 32 back
    for implementation, same in ((name, True), ("sdpa", False)):
        model = model_of("llama", implementation)
        difference = (logits(model, tokens) - logits(model, other))[0, -1].abs().max()
        assert (difference < 1e-5) == same


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(family, side):
    tokens, mask = prompt(3, 90), torch.ones(3, 90, dtype=torch.long)
    for b, padding in enumerate((0, 17, 60)):
        hidden = slice(0, padding) if side == "left" else slice(90 - padding, 90)
        mask[b, hidden] = 0
        tokens[b, hidden] = 0
    expected = logits(peer(family), tokens, attention_mask=mask)
    found = logits(model_of(family, "tessera_dense"), tokens, attention_mask=mask)
    real = mask.bool()
    torch.testing.assert_close(found[real], expected[real], atol=1e-3, rtol=1e-3)


def test_packed_sequences(family):
    tokens = prompt(1, 120)
    positions = torch.cat([torch.arange(50), torch.arange(70)])[None]
    expected = logits(peer(family), tokens, position_ids=positions, use_cache=False)
    found = logits(model_of(family, "tessera_dense"), tokens, position_ids=positions, use_cache=False)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    alone = logits(model_of(family, "tessera_dense"), tokens[:, 50:])
    torch.testing.assert_close(found[:, 50:], alone, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True])
def test_generate(family, cache, padded):
    tokens = prompt(2, 80)
    mask = torch.ones_like(tokens)
    if padded:
        tokens[1, :30], mask[1, :30] = 0, 0
    options = dict(attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None)
    if cache == "static":
        options |= dict(cache_implementation="static", disable_compile=True)
    expected = peer(family).generate(tokens, **options)
    found = model_of(family, "tessera_dense").generate(tokens, **options)
    assert (found == expected).all()


def test_prefill_in_chunks():
    tokens = prompt(1, 150)
    model = model_of("llama", "tessera_dense")
    with torch.no_grad():
        first = model(tokens[:, :70])
        second = model(tokens[:, 70:], past_key_values=first.past_key_values)
    found = torch.cat([first.logits, second.logits], 1)
    torch.testing.assert_close(found, logits(model, tokens), atol=1e-4, rtol=1e-4)


def test_prefill_and_decode_methods():
    name = integration.register_as("tessera_two", "xattention:tau=0.9", decode="quest:budget=64")
    text = model_of("llama", name).generate(prompt(1), max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert text.shape == (1, 155)
    wrong = integration.register_as("tessera_wrong", "dense", decode="flexprefill")
    with pytest.raises(tessera.Error, match="flexprefill does not support decode"):
        model_of("llama", wrong).generate(prompt(1), max_new_tokens=2)


def test_methods_per_layer():
    tokens = prompt(1)
    narrow = "streaming:n_init=16,n_local=16"
    by_dict = integration.register_as("tessera_by_dict", {"0": "dense", "1-": narrow})
    by_list = integration.register_as("tessera_by_list", ["dense", narrow, tessera.Method(narrow)])
    found = [logits(model_of("llama", name), tokens) for name in (by_dict, by_list, "tessera_dense")]
    torch.testing.assert_close(found[0], found[1])
    assert (found[0] - found[2]).abs().max() > 1e-3
    for bad, message in (
        (["dense"], "1 methods are given for a model of 3 layers"),
        ({"0-1": "dense"}, "layer 2 of 3 has no method"),
        ({"0-": "dense", "1": "dense"}, "has a method already"),
        ({"x": "dense"}, "layers 'x'"),
    ):
        name = integration.register_as("tessera_bad", bad)
        with pytest.raises(tessera.Error, match=message):
            logits(model_of("llama", name), tokens)
    with pytest.raises(tessera.Error, match="did you mean"):
        integration.register_as("tessera_bad", {"0-": "denze"})
    with pytest.raises(tessera.Error, match="starts with tessera_"):
        integration.register_as("mine", "dense")


def test_switching_the_implementation():
    model = model_of("llama", "sdpa")
    expected = logits(model, prompt())
    model.set_attn_implementation("tessera_dense")
    torch.testing.assert_close(logits(model, prompt()), expected, atol=1e-3, rtol=1e-3)


def test_training():
    tokens = prompt(2, 60)
    found = {}
    for name in ("tessera_dense", "sdpa"):
        model = model_of("qwen3", name).train()
        model(tokens, labels=tokens).loss.backward()
        found[name] = model.model.layers[0].self_attn.q_proj.weight.grad
    torch.testing.assert_close(found["tessera_dense"], found["sdpa"], atol=1e-5, rtol=1e-3)


def test_half_precision(family):
    expected = logits(peer(family), prompt())
    found = logits(model_of(family, "tessera_dense").to(torch.bfloat16), prompt())
    like = logits(peer(family).to(torch.bfloat16), prompt())
    assert found.dtype == torch.bfloat16
    error = (found.float() - expected).pow(2).mean().sqrt()
    assert error < 1.5 * (like.float() - expected).pow(2).mean().sqrt()


def test_no_mask_of_queries_times_keys():
    for mask in (None, torch.ones(1, 5000, dtype=torch.bool)):
        assert integration.attention_mask(1, 5000, 5000, attention_mask=mask) is None
    padded = torch.ones(1, 5000, dtype=torch.bool)
    padded[0, :7] = False
    assert integration.attention_mask(1, 5000, 5000, attention_mask=padded).shape == (1, 5000)


def test_what_it_refuses():
    from transformers.masking_utils import and_masks, causal_mask_function

    model = model_of("llama", "tessera_dense")
    with pytest.raises(tessera.Error, match="attention_mask has shape"):
        logits(model, prompt(1, 10), attention_mask=torch.ones(1, 1, 10, 10, dtype=torch.bool))
    with pytest.raises(tessera.Error, match="which tessera has not"):
        integration.attention_mask(1, 5, 5, mask_function=and_masks(causal_mask_function, lambda b, h, q, k: k > 1))


def test_bidirectional_models():
    config = BertConfig(vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    tokens = torch.randint(1, 50, (2, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[1, 25:] = 0
    found = {}
    for name in ("sdpa", "tessera_dense"):
        torch.manual_seed(1)
        model = BertModel._from_config(config, attn_implementation=name).eval()
        with torch.no_grad():
            found[name] = model(tokens, attention_mask=mask).last_hidden_state
    real = mask.bool()
    torch.testing.assert_close(found["tessera_dense"][real], found["sdpa"][real], atol=1e-4, rtol=1e-4)
