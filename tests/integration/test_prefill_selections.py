# SPDX-License-Identifier: Apache-2.0
"""Selections of prefill methods against their papers, restated with whole matrices in float64.

No tiles of keys are streamed here, no panels, no partial sorts: every score matrix stands in memory, as in the dense
PyTorch forms that the authors use for checking. The pairs that `tessera attend --mask-out` reports must be the same.
Needs numpy, safetensors and pytest; run as `pytest tests/integration --tessera build/release/bin/tessera`.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")
safetensors_numpy = pytest.importorskip("safetensors.numpy")

HEADS, KV_HEADS, DIM = 4, 2, 32
GROUP = HEADS // KV_HEADS
SCALE = DIM ** -0.5


def tensors(tokens: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Heads with a few topics, so that tiles differ, and one loud key."""
    random = np.random.default_rng(seed)
    topics = random.normal(size=(7, DIM))
    topic = np.repeat(random.integers(0, 7, size=tokens // 40 + 1), 40)[:tokens]
    k = random.normal(size=(1, KV_HEADS, tokens, DIM)) * 0.6 + topics[topic]
    k[:, :, tokens // 3] *= 3
    asked = np.repeat(random.integers(0, 7, size=tokens // 25 + 1), 25)[:tokens]
    q = random.normal(size=(1, HEADS, tokens, DIM)) * np.array([0.5, 1, 2, 3])[None, :, None, None] + topics[asked]
    v = random.normal(size=(1, KV_HEADS, tokens, DIM))
    return {name: x.astype(np.float32) for name, x in (("q", q), ("k", k), ("v", v))}


def selection(tessera: Path, folder: Path, spec: str, data: dict[str, np.ndarray]) -> np.ndarray:
    """Pairs that are computed: [heads, tokens, tokens]."""
    safetensors_numpy.save_file(data, folder / "qkv.safetensors")
    subprocess.run([tessera, "attend", "--qkv", folder / "qkv.safetensors", "--causal", "--method", spec, "--mask-out",
                    folder / "mask.safetensors"], check=True, capture_output=True)
    return safetensors_numpy.load_file(folder / "mask.safetensors")["mask"][0].astype(bool)


def softmax(scores: np.ndarray) -> np.ndarray:
    """Over the last axis; -inf is masked."""
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def of_head(data: dict[str, np.ndarray], head: int) -> tuple[np.ndarray, np.ndarray]:
    """Queries and keys of a query head."""
    return data["q"][0, head].astype(np.float64), data["k"][0, head // GROUP].astype(np.float64)


def causal(mask: np.ndarray) -> np.ndarray:
    """Without pairs after the query."""
    return mask & np.tri(*mask.shape, dtype=bool)


def of_tiles(tiles: np.ndarray, tile_q: int, tile_k: int, tokens: int) -> np.ndarray:
    """Pairs of a mask of tiles."""
    return causal(np.kron(tiles, np.ones((tile_q, tile_k), dtype=bool))[:tokens, :tokens])


def descending(scores: np.ndarray) -> np.ndarray:
    """Indices by falling score, ties by rising index."""
    return np.argsort(-scores, kind="stable")


def tile_means(rows: np.ndarray, tile: int) -> np.ndarray:
    """Means over the tokens that each tile has."""
    starts = np.arange(0, len(rows), tile)
    return np.add.reduceat(rows, starts) / np.diff(np.append(starts, len(rows)))[:, None]


def xattention(q: np.ndarray, k: np.ndarray, stride: int, tau: float, block: int) -> np.ndarray:
    """Antidiagonal sums through the strided layout of the paper."""
    joined_q = np.concatenate([q[stride - 1 - i::stride] for i in range(stride)], axis=1)
    joined_k = np.concatenate([k[i::stride] for i in range(stride)], axis=1)
    scores = joined_q @ joined_k.T * SCALE / stride
    scores[~np.tri(*scores.shape, dtype=bool)] = -np.inf
    per_tile = block // stride
    tiles = len(q) // block
    mass = softmax(scores).reshape(tiles, per_tile, tiles, per_tile).sum(axis=(1, 3))
    kept = np.zeros((tiles, tiles), dtype=bool)
    for i, row in enumerate(mass):
        kept[i, [0, i]] = True
        for j in descending(row[:i + 1]):
            if row[kept[i]].sum() >= tau * row.sum():
                break
            kept[i, j] = True
    return of_tiles(kept, block, block, len(q))


def line_sums(q: np.ndarray, k: np.ndarray, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums of the last rows' probabilities by key and by distance."""
    tokens = len(q)
    positions = np.arange(tokens - last, tokens)[:, None]
    scores = q[-last:] @ k.T * SCALE
    scores[np.arange(tokens)[None] > positions] = -np.inf
    p = softmax(scores)
    distance = positions - np.arange(tokens)[None]
    seen = distance >= 0
    return p.sum(axis=0), np.bincount(distance[seen], weights=p[seen], minlength=tokens)


def minference(q: np.ndarray, k: np.ndarray, vertical: int, slash: int) -> np.ndarray:
    """Vertical and slash lines as 64-key runs and single keys."""
    tokens, tile = len(q), 64
    columns, offsets = line_sums(q, k, 64)
    columns[:30] = offsets[:100] = np.inf
    columns = np.sort(descending(columns)[:vertical])
    offsets = descending(offsets)[:slash]
    mask = np.zeros((tokens, tokens), dtype=bool)
    for begin in range(0, tokens, tile):
        runs: list[list[int]] = []
        for offset in sorted((int(o) for o in offsets if o < begin + tile), reverse=True):
            first = max(begin - offset, 0)
            end = first + tile
            if not runs or end > runs[-1][1] + tile:
                runs.append([first, end])
            elif end > runs[-1][1]:
                runs[-1][1] += tile
        rows = mask[begin:begin + tile]
        for first, end in runs:
            rows[:, first:end] = True
        rows[:, [c for c in columns if c < begin]] = True
    return causal(mask)


def flexprefill(q: np.ndarray, k: np.ndarray, block: int, gamma: float, tau: float, least_tokens: int) -> np.ndarray:
    """Query-aware or vertical-slash tiles, chosen by the divergence of the probe."""
    tokens = len(q)
    tiles = tokens // block
    columns, offsets = (x / block for x in line_sums(q, k, block))
    by_tile = columns.reshape(tiles, block).sum(axis=1)
    by_diagonal = offsets.reshape(tiles, block).sum(axis=1)
    mean_k = tile_means(k, block)
    estimate = softmax(q[-block:].mean(axis=0) @ mean_k.T * SCALE)
    middle = (estimate + by_tile) / 2
    divergence = 0.5 * (estimate * np.log(estimate / middle)).sum() + 0.5 * np.where(
        by_tile > 0, by_tile * np.log(np.where(by_tile > 0, by_tile, 1) / middle), 0).sum()
    aware = np.sqrt(max(divergence, 0)) < tau
    least = -(-least_tokens // block)

    def count(lines: np.ndarray) -> int:
        if aware:
            return least
        number = int((np.cumsum(np.sort(lines)[::-1]) <= gamma).sum()) + 1
        return min(max(number // block + 1, least), tiles)

    keep_columns, keep_diagonals = count(columns), count(offsets)
    by_tile[0] = by_diagonal[0] = np.inf
    kept = np.zeros((tiles, tiles), dtype=bool)
    kept[:, descending(by_tile)[:keep_columns]] = True
    for back in descending(by_diagonal)[:keep_diagonals]:
        kept |= np.eye(tiles, k=-int(back), dtype=bool)
    if aware:
        scores = tile_means(q, block) @ mean_k.T * SCALE
        scores[~np.tri(tiles, dtype=bool)] = -np.inf
        flat = softmax(scores).ravel()
        order = descending(flat)
        chosen = np.zeros(flat.shape, dtype=bool)
        chosen[order[np.cumsum(flat[order]) <= gamma * tiles]] = True
        kept |= chosen.reshape(tiles, tiles)
    return of_tiles(kept & np.tri(tiles, dtype=bool), block, block, tokens)


def self_similarity(rows: np.ndarray, tile: int) -> np.ndarray:
    """Mean cosine over all pairs of a tile, through the Gram matrix."""
    result = []
    for begin in range(0, len(rows), tile):
        unit = rows[begin:begin + tile]
        unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
        result.append((unit @ unit.T).mean())
    return np.array(result)


def sparge(q: np.ndarray, k: np.ndarray, theta: float, cdf: float, block_q: int, block_k: int) -> np.ndarray:
    """Pooled scores of self-similar tiles, cumulative mass without the tile that crosses."""
    tokens = len(q)
    k = k - k.mean(axis=0)
    q_alike, k_alike = self_similarity(q, block_q) > theta, self_similarity(k, block_k) > theta
    scores = tile_means(q, block_q) @ tile_means(k, block_k).T * SCALE
    kept = np.zeros(scores.shape, dtype=bool)
    for i, row in enumerate(scores):
        visible = np.arange(len(row)) * block_k < min((i + 1) * block_q, tokens)
        if not q_alike[i]:
            kept[i] = visible
            continue
        kept[i] = visible & ~k_alike
        candidates = visible & k_alike
        if candidates.any():
            p = softmax(np.where(candidates, row, -np.inf))
            order = descending(p)
            chosen = order[np.cumsum(p[order]) <= cdf]
            kept[i, chosen if len(chosen) else order[:1]] = True
        kept[i, ~visible] = False
        kept[i, 0] = True
    return of_tiles(kept, block_q, block_k, tokens)


def rotated(rows: np.ndarray, positions: np.ndarray, base: float) -> np.ndarray:
    """Rotary embedding, halves of the vector against each other."""
    half = rows.shape[-1] // 2
    angles = positions[:, None] * base ** (-np.arange(half) / half)[None]
    first, second = rows[:, :half], rows[:, half:]
    return np.concatenate([first * np.cos(angles) - second * np.sin(angles),
                           second * np.cos(angles) + first * np.sin(angles)], axis=1)


def seer(data: dict[str, np.ndarray], head: int, threshold: float, block: int, last_dense: int) -> np.ndarray:
    """Softmax of the gate above a threshold, the diagonal and the last tiles."""
    q = data["gate_q"][0, head].astype(np.float64)
    k = data["gate_k"][0, head // GROUP].astype(np.float64)
    tokens = len(q)
    starts = np.arange(0, tokens, block)
    pooled = np.concatenate([np.maximum.reduceat(k, starts), np.minimum.reduceat(k, starts), tile_means(k, block)], axis=1)
    weights = np.concatenate([data[f"gate_wk_{name}"][head] for name in ("max", "min", "avg")]).astype(np.float64)
    gate_k = rotated(pooled @ weights, starts, 10000.0)
    gate_q = rotated(tile_means(q, block), starts, 10000.0)
    scores = gate_q @ gate_k.T / np.sqrt(gate_k.shape[1])
    tiles = len(scores)
    lower = np.tri(tiles, dtype=bool)
    kept = (softmax(np.where(lower, scores, -np.inf)) > threshold) | np.eye(tiles, dtype=bool)
    kept[tiles - last_dense:] = True
    return of_tiles(kept & lower, block, block, tokens)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("stride", "tau", "block"), [(8, 0.9, 128), (16, 0.6, 64), (1, 0.8, 64)])
def test_xattention(tessera: Path, tmp_path: Path, stride: int, tau: float, block: int, seed: int) -> None:
    """Every head keeps the same tiles."""
    data = tensors(1024, seed)
    mask = selection(tessera, tmp_path, f"xattention:stride={stride},tau={tau},block={block}", data)
    for head in range(HEADS):
        assert (mask[head] == xattention(*of_head(data, head), stride, tau, block)).all()
    assert mask.mean() < 0.5


@pytest.mark.parametrize("tokens", [1024, 1000, 130])
@pytest.mark.parametrize(("vertical", "slash"), [(60, 130), (30, 50), (200, 110)])
def test_minference(tessera: Path, tmp_path: Path, vertical: int, slash: int, tokens: int) -> None:
    """The same runs and columns, also with a ragged last tile."""
    data = tensors(tokens)
    mask = selection(tessera, tmp_path, f"minference:v={vertical},sl={slash}", data)
    for head in range(HEADS):
        assert (mask[head] == minference(*of_head(data, head), vertical, slash)).all()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("tau", [0.0, 0.25, 1.0])
def test_flexprefill(tessera: Path, tmp_path: Path, tau: float, seed: int) -> None:
    """Query-aware heads, vertical-slash heads, and some of each."""
    data = tensors(2048, seed)
    mask = selection(tessera, tmp_path, f"flexprefill:block=64,gamma=0.7,tau={tau},min_budget=128", data)
    for head in range(HEADS):
        assert (mask[head] == flexprefill(*of_head(data, head), 64, 0.7, tau, 128)).all()
    assert mask.mean() < 0.5


@pytest.mark.parametrize("tokens", [1024, 1000])
@pytest.mark.parametrize(("theta", "cdf"), [(0.2, 0.8), (-1, 0.5), (0.45, 0.95)])
def test_sparge(tessera: Path, tmp_path: Path, theta: float, cdf: float, tokens: int) -> None:
    """The predicted tiles, without the skip while running."""
    data = tensors(tokens)
    mask = selection(tessera, tmp_path, f"sparge:theta={theta},cdf={cdf},block_q=64,block_k=32,online_skip=false", data)
    for head in range(HEADS):
        assert (mask[head] == sparge(*of_head(data, head), theta, cdf, 64, 32)).all()


@pytest.mark.parametrize("tokens", [1024, 1000])
@pytest.mark.parametrize("threshold", [0.002, 0.03])
def test_seer(tessera: Path, tmp_path: Path, threshold: float, tokens: int) -> None:
    """The gate with queries by their average and keys by maximum, minimum and average."""
    data = tensors(tokens)
    random = np.random.default_rng(9)
    data["gate_q"] = random.normal(size=(1, HEADS, tokens, DIM)).astype(np.float32)
    data["gate_k"] = random.normal(size=(1, KV_HEADS, tokens, DIM)).astype(np.float32)
    for name in ("max", "min", "avg"):
        data[f"gate_wk_{name}"] = (random.normal(size=(HEADS, DIM, DIM)) * 3).astype(np.float32)
    mask = selection(tessera, tmp_path, f"seer:threshold={threshold},block=64,last_dense=2", data)
    for head in range(HEADS):
        assert (mask[head] == seer(data, head, threshold, 64, 2)).all()
    assert mask.mean() < 0.5
