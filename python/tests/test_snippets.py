"""The Python in README.md and docs/python runs as it stands, block after block, on what the text around it assumes."""

import pathlib
import re
import types

import matplotlib
import numpy as np
import pytest

import tessera

ROOT = pathlib.Path(__file__).parents[2]
matplotlib.use("Agg")


def blocks_of(page):
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def run(page, **names):
    blocks = blocks_of(page)
    assert blocks, page
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page}, block {number}", "exec"), names)
    return names


@pytest.fixture
def arrays(rng):
    """q, k, v of 2,000 tokens, 8 query heads on 2."""
    make = lambda heads: rng.standard_normal((1, heads, 2000, 32)).astype(np.float32)  # noqa: E731
    return dict(q=make(8), k=make(2), v=make(2))


def test_readme(arrays):
    assert run("README.md", **arrays)["o"].shape == arrays["q"].shape


def test_index(arrays):
    names = run("docs/python/index.md", **arrays)
    assert names["lse"].shape == (1, 8, 2000) and names["both"].density >= names["plan"].density


def test_the_error_of_the_page(arrays):
    with pytest.raises(tessera.Error) as error:
        tessera.attention(**arrays, method="xattention", taw=0.9)
    assert str(error.value) in (ROOT / "docs/python/index.md").read_text()


def test_models(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    names = run("docs/python/models.md", prompt="Once upon a time there was a little cat. " * 20)
    assert names["result"].statistics["density"] <= 1 and len(names["plans"]) > 0 and len(names["table"]) == 4
    assert capsys.readouterr().out


def calls_of_the_migration_tables():
    for line in (ROOT / "docs/python/migration.md").read_text().splitlines():
        if not line.startswith("| "):
            continue
        for code in re.findall(r"`((?:attention|run|Plan\.\w+)\(.*?\))`", line.split(" | ")[-1]):
            code = re.sub(r"\((?:\.\.\.)", "(q, k, v", code)  # "..." stands for what was said before
            yield re.sub(r", (?:\w+=)?\.\.\.", "", code)


@pytest.mark.parametrize("code", sorted(set(calls_of_the_migration_tables())))
def test_migration(code, rng):
    q, k, v = (rng.standard_normal((1, heads, 256, 32)).astype(np.float32) for heads in (4, 2, 2))
    problem = tessera.problem_of(q, k, v, causal=True)
    names = {name: getattr(tessera, name) for name in ("attention", "run", "Plan", "problem_of")}
    names |= dict(
        q=q, k=k, v=v, s=0.2, l=31, r=0, c=30.0, a=np.ones(4, np.float32), t=0.5, v_size=64, s_size=64, top_k=2,
        cu_q=[0, 1, 4], cu_k=[0, 1, 2], problem=problem, plan=tessera.plan(q, k, causal=True), p=tessera.plan(q, k, causal=True),
        mask=np.tri(256, dtype=bool), R=64, C=64, indptr=[0, 1, 2, 3, 4], indices=[0, 0, 1, 2],
    )  # fmt: skip
    if "NHD" in code and "BNHD" not in code:
        names |= dict(q=q[0], k=k[0], v=v[0])
    if "page_table" in code:
        pools = (x.reshape(2, 16, 16, 32).transpose(1, 0, 2, 3).copy() for x in (k[0], v[0]))
        names |= dict(zip(("k_pool", "v_pool"), pools)) | dict(t=np.arange(16)[None], p=16)
    if "block_mask" in code:
        flex = pytest.importorskip("torch.nn.attention.flex_attention")
        names["m"] = flex.create_block_mask(lambda b, h, i, j: i >= j, None, None, 256, 256, device="cpu")
    result = eval(code, names)
    assert isinstance(result, tessera.Plan) or np.isfinite(result).all()


def test_torch():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 96, 128) for heads in (32, 4, 4))
    names = run("docs/python/torch.md", x=torch.randn(1, 96, 2048), q=q, k=k, v=v)
    assert names["o"].shape == q.shape and names["o"].requires_grad


def test_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    names = run("docs/python/transformers.md", folder=tmp_path)
    model = names["model"].eval()
    prompt = torch.randint(3, 50, (1, 200))
    for implementation in ("tessera_streaming", "tessera_long"):
        model.set_attn_implementation(implementation)
        assert model.generate(prompt, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0).shape == (1, 203)


def test_diffusers(capsys):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=48, in_channels=4, out_channels=4, text_dim=16, freq_dim=32, ffn_dim=64,
        num_layers=2, patch_size=(1, 2, 2), rope_max_seq_len=64,
    ).eval()  # fmt: skip
    latents = torch.randn(1, 4, 3, 16, 16)

    class Pipe(types.SimpleNamespace):
        def __call__(self, *_):
            with torch.no_grad():
                return self.transformer(latents, torch.tensor([500]), torch.randn(1, 9, 16), return_dict=False)[0]

    names = run("docs/python/diffusers.md", pipe=Pipe(transformer=transformer), latents=latents, text_tokens=0)
    assert names["use"].calls == 2 and names["use"].others == 2
    assert "2 self-attentions" in capsys.readouterr().out
