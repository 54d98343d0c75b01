"""Plans: views, files, pictures, lifetimes."""

import gc
import pickle
import sys
import weakref

import matplotlib
import numpy as np
import pytest
import torch

import tessera

matplotlib.use("Agg")


@pytest.fixture
def plan(qkv):
    return tessera.plan(*qkv, "xattention", tau=0.7, block=32, stride=8, causal=True)


def test_arrays_are_views(plan):
    entries = plan.entries
    assert entries.dtype == tessera.ENTRY and entries.dtype.itemsize == 24
    assert plan.entry_begin[-1] == len(entries) and plan.row_begin[-1] == plan.rows == len(plan.entry_begin) - 1
    assert plan.bands.tolist()[0] == [-1, 0]
    address = entries.__array_interface__["data"][0]
    assert plan.entries.__array_interface__["data"][0] == address
    for array in (entries, plan.row_begin, plan.entry_begin, plan.tokens, plan.mask_words, plan.bands):
        assert not array.flags.writeable
        with pytest.raises(ValueError):
            array.flags.writeable = True


def test_views_keep_the_plan_alive(qkv):
    plan = tessera.plan(*qkv, "hip", causal=True)
    entries, begins, tokens = plan.entries, plan.entry_begin, plan.tokens
    copies = [x.copy() for x in (entries, begins, tokens)]
    watch = weakref.ref(plan)
    del plan
    gc.collect()
    assert watch() is None  # the wrapper is gone, what it wrapped is not
    noise = [tessera.plan(*qkv, "streaming", causal=True) for _ in range(20)]
    for view, copy in zip((entries, begins, tokens), copies, strict=True):
        assert (view == copy).all()
    del noise


def test_references_are_given_back(qkv):
    q, k, v = qkv
    before = [sys.getrefcount(x) for x in qkv]
    for _ in range(5):
        plan = tessera.plan(q, k, v, "xattention", causal=True)
        tessera.run(plan, q, k, v, return_lse=True)
        tessera.attention(q, k, v, "streaming", causal=True)
        with pytest.raises(tessera.Error):
            tessera.attention(q, k, v[:, :, 1:])
    gc.collect()
    assert [sys.getrefcount(x) for x in qkv] == before
    tensors = [torch.from_numpy(x) for x in qkv]
    before = [sys.getrefcount(x) for x in tensors]
    for _ in range(5):
        tessera.attention(*tensors, causal=True)
    gc.collect()
    assert [sys.getrefcount(x) for x in tensors] == before


def test_rows_say_what_the_mask_says(plan):
    """The arrays alone, read as their documentation says, give the mask."""
    problem = plan.problem
    mask = plan.to_mask()
    heads = np.arange(problem.q_heads) * plan.plan_heads // problem.q_heads
    for b in range(problem.batch):
        for h in range(problem.q_heads):
            block = (0 if plan.plan_sequences == 1 else b) * plan.plan_heads + heads[h]
            seen = np.zeros((problem.q_len, problem.kv_len), bool)
            first_row = plan.row_begin[block]
            for row in range(first_row, plan.row_begin[block + 1]):
                queries = slice((row - first_row) * plan.tile_q, (row - first_row + 1) * plan.tile_q)
                for entry in plan.entries[plan.entry_begin[row] : plan.entry_begin[row + 1]]:
                    assert entry["source"] == 0 and entry["mask"] != 2 and entry["kind"] != 2
                    step = plan.tile_k if entry["kind"] == 0 else 1
                    keys = slice(entry["begin"] * step, (entry["begin"] + entry["count"]) * step)
                    part = np.zeros_like(seen)
                    part[queries, keys] = True
                    if entry["mask"] == 1:
                        left, right = plan.bands[entry["mask_index"]]
                        distance = np.arange(problem.kv_len)[None] - np.arange(problem.q_len)[:, None]
                        part &= (distance <= right) if right >= 0 else True
                        part &= (distance >= -left) if left >= 0 else True
                    seen |= part
            assert (seen == mask[b, h]).all()


def test_transpose(plan):
    transposed = plan.transpose()
    assert transposed.key_tile_begin[0] == 0 and transposed.offsets[-1] == len(transposed.rows)


def test_files(plan, tmp_path):
    path = tmp_path / "plan.safetensors"
    plan.save(path)
    assert tessera.Plan.load(path) == plan
    assert pickle.loads(pickle.dumps(plan)) == plan
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(tessera.Error, match="plan.safetensors"):
        tessera.Plan.load(path)
    with pytest.raises(tessera.Error, match="absent"):
        tessera.Plan.load(tmp_path / "absent")


def test_operands_must_fit(plan):
    other = tessera.Plan.dense(tessera.Problem(q_len=5, kv_len=5, head_dim=8))
    with pytest.raises(tessera.Error):
        plan | other
    with pytest.raises(TypeError):
        plan | 3
    with pytest.raises(TypeError):
        hash(plan)
    assert plan != 3
    with pytest.raises(TypeError, match="tessera.plan"):
        tessera.Plan(3)


def test_from_mask_checks(plan):
    problem = tessera.Problem(q_heads=2, q_len=5, kv_len=5, head_dim=8, causal=True)
    with pytest.raises(tessera.Error, match="dtype"):
        tessera.Plan.from_mask(problem, np.ones((5, 5)))
    with pytest.raises(tessera.Error, match="shape"):
        tessera.Plan.from_mask(problem, np.ones((5, 6), bool))
    with pytest.raises(tessera.Error):
        tessera.Plan.from_mask(problem, np.ones((5, 5), bool))  # looks ahead
    mask = np.tri(5, dtype=bool)
    assert (tessera.Plan.from_mask(problem, torch.from_numpy(mask)).to_mask() == mask).all()


def test_block_sparse_rows():
    problem = tessera.Problem(q_heads=2, q_len=48, kv_len=64, head_dim=8)
    plan = tessera.Plan.from_bsr(problem, 16, 32, [0, 1, 1, 3], [1, 0, 1])
    expected = np.zeros((48, 64), bool)
    expected[:16, 32:] = expected[32:] = True
    assert (plan.to_mask() == expected).all()
    with pytest.raises(tessera.Error):
        tessera.Plan.from_bsr(problem, 16, 32, [0, 1, 1, 3], [1, 0, 2])


def test_block_masks_of_flex_attention():
    from torch.nn.attention.flex_attention import create_block_mask

    def causal_window(b, h, q, k):
        return (q >= k) & (q - k < 128)

    block_mask = create_block_mask(causal_window, 1, 1, 512, 512, device="cpu", BLOCK_SIZE=64)
    problem = tessera.Problem(batch=2, q_heads=2, q_len=512, kv_len=512, head_dim=8, causal=True)
    plan = tessera.Plan.from_block_mask(problem, block_mask)
    tiles = np.arange(512) // 64
    blocks = (tiles[:, None] - tiles[None] <= 2) & np.tri(512, dtype=bool)
    assert (plan.to_mask() == blocks).all()


def test_pictures(plan):
    shares = plan.map(head=1, cells=16)
    mask = plan.to_mask()[0, 1]
    assert shares.shape[0] <= 16 and shares.max() <= 1
    cell = -(-300 // 16)
    pooled = [
        [mask[i : i + cell, j : j + cell].sum() / max(1, np.tri(300)[i : i + cell, j : j + cell].sum()) for j in range(0, 300, cell)]
        for i in range(0, 300, cell)
    ]
    np.testing.assert_allclose(np.where(shares < 0, 0, shares), pooled, atol=1e-6)
    ax = plan.plot(head=1)
    assert "head 1" in ax.get_title() and ax.get_ylim() == (300, 0)
    assert plan.plot(ax=ax) is ax
    page = plan._repr_html_()
    assert page.count("data:image/png") == 4 and "density" in page
    for bad in (dict(head=9), dict(sequence=2), dict(cells=0)):
        with pytest.raises(tessera.Error):
            plan.map(**bad)


def test_numbers(plan):
    statistics = plan.statistics()
    assert statistics.planned_pairs == plan.to_mask().sum()
    assert plan.density == statistics.density and len(statistics.head_density) == 4
    assert "density" in plan.explain() and "density" in repr(plan)
    assert plan.memory_bytes >= plan.entries.nbytes
    plan.validate()
