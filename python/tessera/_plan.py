"""Plans: which keys each tile of queries reads."""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import _core
from ._arrays import integers, is_tensor
from ._core import Error, Problem

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ENTRY = np.dtype(
    [("begin", "<i8"), ("count", "<i4"), ("kind", "u1"), ("mask", "u1"), ("source", "<u2"), ("mask_index", "<i8")]
)
"""One piece of a plan row. kind: 0 tile, 1 run, 2 gather; mask: 0 none, 1 band, 2 bitmask."""

KINDS = ("tile", "run", "gather")
MASKS = ("none", "band", "bitmask")


class Statistics(NamedTuple):
    """Numbers about a plan. Density is judged against the pairs that the problem's own mask allows."""

    allowed_pairs: int
    planned_pairs: int
    executed_pairs: int
    """Area of the entries before masks: what the time follows."""
    density: float
    executed_density: float
    flops: float
    kv_bytes: float
    entries: int
    empty_rows: int
    head_density: list[float]


class Source(NamedTuple):
    """Keys that entries may name; source 0 is the raw K and V."""

    name: str
    keys: int
    repeats_allowed: bool


class Transpose(NamedTuple):
    """Key tile -> query tiles, compressed rows per (sequence, plan head)."""

    key_tile_begin: np.ndarray
    offsets: np.ndarray
    rows: np.ndarray


class Plan:
    """Which keys each tile of queries reads, and how they are masked. Immutable.

    Made by `tessera.plan`, or by `dense`, `from_mask`, `from_block_mask`, `from_bsr`, `load`. Its arrays are read-only
    NumPy views, which keep the plan alive:

    * `row_begin` int64 [plan sequences * plan heads + 1]: first row of each (sequence, head)
    * `entry_begin` int64 [rows + 1]: first entry of each row, that is of each query tile
    * `entries` [n] of dtype `tessera.ENTRY`
    * `tokens` int32: pool of gathered key lists; `mask_words` uint64: pool of bitmasks; `bands` int64 [n, 2]: windows
    * `query_order`, `key_order`: int32 permutations per (sequence, head); empty lists: natural order

    `a | b`, `a & b`, `~a` are union, intersection and complement; operands need one problem and one tile height.
    """

    __slots__ = ("_native", "__weakref__")

    def __init__(self, native: _core.Plan) -> None:
        if not isinstance(native, _core.Plan):
            raise TypeError("plans are made by tessera.plan, Plan.dense, Plan.from_mask, Plan.load, ...")
        self._native = native

    @classmethod
    def dense(cls, problem: Problem, tile_q: int = 128, tile_k: int = 128) -> Plan:
        """Every pair that the problem allows."""
        return cls(_core.Plan.dense(problem, tile_q, tile_k))

    @classmethod
    def from_mask(cls, problem: Problem, mask: Any, tile_q: int = 128, tile_k: int = 128) -> Plan:
        """Exactly the pairs of a boolean mask [batch, q_heads, q_len, kv_len] (True = keep), axes of size 1 repeated.

        Raises Error where the mask holds a pair that the problem forbids.
        """
        array = mask.detach().cpu().numpy() if is_tensor(mask) else np.asarray(mask)
        if array.dtype != np.bool_:
            raise Error(f"mask has dtype {array.dtype}; expected bool (True = keep)")
        batch = 1 if problem.cu_seqlens_q else problem.batch
        shape = (batch, problem.q_heads, problem.q_len, problem.kv_len)
        try:
            array = np.broadcast_to(array, shape)
        except ValueError:
            raise Error(f"mask has shape {array.shape}; expected {shape}") from None
        return cls(_core.Plan.from_mask(problem, np.ascontiguousarray(array).view(np.uint8), tile_q, tile_k))

    @classmethod
    def from_block_mask(cls, problem: Problem, block_mask: Any) -> Plan:
        """The blocks of a BlockMask of PyTorch FlexAttention.

        Partial blocks are computed whole, cut by the causality of the problem: other mask_mods are not evaluated.
        """
        block_q, block_k = block_mask.BLOCK_SIZE
        counts, indices = block_mask.kv_num_blocks, block_mask.kv_indices
        full_counts, full_indices = block_mask.full_kv_num_blocks, block_mask.full_kv_indices
        nothing: np.ndarray = np.zeros(0, np.int32)
        has_full = full_counts is not None
        heads = (problem.batch, problem.q_heads)

        def spread(x: Any, name: str) -> np.ndarray:
            array = integers(x, name)
            return np.ascontiguousarray(np.broadcast_to(array, heads + array.shape[2:]))

        return cls(
            _core.Plan.from_block_mask(
                problem,
                int(block_q),
                int(block_k),
                spread(counts, "kv_num_blocks"),
                spread(indices, "kv_indices"),
                spread(full_counts, "full_kv_num_blocks") if has_full else nothing,
                spread(full_indices, "full_kv_indices") if has_full else nothing,
            )
        )

    @classmethod
    def from_bsr(cls, problem: Problem, block_q: int, block_k: int, indptr: Any, indices: Any) -> Plan:
        """Block-sparse rows for all heads: indptr int [rows + 1], indices int of key tiles (FlashInfer, scipy)."""
        return cls(
            _core.Plan.from_bsr(problem, block_q, block_k, integers(indptr, "indptr"), integers(indices, "indices"))
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Reads a plan file. Raises Error for anything but a valid plan."""
        return cls(_core.Plan.load(os.fspath(path)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file that `load`, the C++ library and the command line read."""
        self._native.save(os.fspath(path))

    @property
    def problem(self) -> Problem:
        return self._native.problem

    @property
    def tile_q(self) -> int:
        """Query rows of a tile."""
        return self._native.tile_q

    @property
    def tile_k(self) -> int:
        """Keys of an aligned tile."""
        return self._native.tile_k

    @property
    def plan_sequences(self) -> int:
        """1 (shared by all sequences) or the batch."""
        return self._native.plan_sequences

    @property
    def plan_heads(self) -> int:
        """1 (shared), the kv heads (one per group) or the query heads."""
        return self._native.plan_heads

    @property
    def rows(self) -> int:
        """Query tiles of all (sequence, plan head) pairs."""
        return self._native.rows

    @property
    def row_begin(self) -> np.ndarray:
        return self._native.row_begin

    @property
    def entry_begin(self) -> np.ndarray:
        return self._native.entry_begin

    @property
    def entries(self) -> np.ndarray:
        return self._native.entries.view(ENTRY)[:, 0]

    @property
    def tokens(self) -> np.ndarray:
        return self._native.tokens

    @property
    def mask_words(self) -> np.ndarray:
        return self._native.mask_words

    @property
    def bands(self) -> np.ndarray:
        return self._native.bands

    @property
    def query_order(self) -> list[np.ndarray]:
        return self._native.query_order

    @property
    def key_order(self) -> list[np.ndarray]:
        return self._native.key_order

    @property
    def sources(self) -> list[Source]:
        return [Source(*source) for source in self._native.sources]

    @property
    def memory_bytes(self) -> int:
        return self._native.memory_bytes

    def union(self, other: Plan) -> Plan:
        return Plan(self._native.unite(other._native))

    def intersection(self, other: Plan) -> Plan:
        return Plan(self._native.intersect(other._native))

    def complement(self) -> Plan:
        """The pairs that the problem allows and the plan leaves out."""
        return Plan(self._native.complement())

    def __or__(self, other: Plan) -> Plan:
        return self.union(other) if isinstance(other, Plan) else NotImplemented

    def __and__(self, other: Plan) -> Plan:
        return self.intersection(other) if isinstance(other, Plan) else NotImplemented

    def __invert__(self) -> Plan:
        return self.complement()

    def __eq__(self, other: object) -> bool:
        return self._native == other._native if isinstance(other, Plan) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def transpose(self) -> Transpose:
        """For each key tile, the query tiles that read it."""
        return Transpose(*self._native.transpose())

    def coverage(self, reference: Plan) -> float:
        """Share of the pairs of `reference` that this plan computes too."""
        return self._native.coverage(reference._native)

    def validate(self) -> None:
        """Raises Error naming the first fault."""
        self._native.validate()

    def statistics(self) -> Statistics:
        return Statistics(**self._native.statistics())

    @property
    def density(self) -> float:
        """Computed pairs over allowed pairs."""
        return self.statistics().density

    def explain(self) -> str:
        """Statistics as a few lines of text."""
        return self._native.explain()

    def to_mask(self) -> np.ndarray:
        """Which pairs of the raw keys are computed: bool [batch, q_heads, q_len, kv_len]. For tests and pictures.

        Variable-length batches have batch 1 and all tokens. Raises Error above 2**31 elements.
        """
        return self._native.to_mask().view(np.bool_)

    def map(self, head: int = 0, sequence: int = 0, cells: int = 256) -> np.ndarray:
        """The computed share of the pairs of one query head, pooled to at most cells x cells.

        float32 [rows, columns], rows over query positions, columns over keys; -1 where the problem allows no pair.
        """
        return self._native.map(sequence, head, cells)

    def plot(self, head: int = 0, sequence: int = 0, cells: int = 256, ax: Axes | None = None) -> Axes:
        """Draws `map` with matplotlib, on `ax` or new axes, which are returned."""
        import matplotlib.pyplot as plt

        if ax is None:
            _, ax = plt.subplots(figsize=(5, 5))
        shares = self.map(head, sequence, cells)
        problem = self.problem
        keys = problem.kv_len
        queries = problem.q_len
        if problem.cu_seqlens_q:
            queries = problem.cu_seqlens_q[sequence + 1] - problem.cu_seqlens_q[sequence]
            keys = problem.cu_seqlens_k[sequence + 1] - problem.cu_seqlens_k[sequence]
        first = keys - queries if problem.q_offset is None else problem.q_offset
        shown = np.ma.masked_less(shares, 0)
        image = ax.imshow(
            shown, extent=(0, keys, first + queries, 0), vmin=0, vmax=1, cmap="YlGnBu", interpolation="nearest"
        )
        ax.set_ylim(first + queries, first)
        ax.set_aspect("auto")
        ax.set_facecolor("white")
        ax.set_xlabel("key position")
        ax.set_ylabel("query position")
        ax.set_title(f"head {head}: {100 * self.statistics().head_density[head]:.1f} % of the pairs", fontsize=10)
        ax.figure.colorbar(image, ax=ax, label="computed share", fraction=0.046)
        return ax

    def __repr__(self) -> str:
        p = self.problem
        return (
            f"tessera.Plan({p.batch} x {p.q_heads} heads, {p.q_len} queries x {p.kv_len} keys, tiles {self.tile_q} x "
            f"{self.tile_k}, {len(self.entries)} entries, density {self.density:.4f})"
        )

    def _repr_html_(self) -> str:
        statistics = self.statistics()
        shown = range(min(4, self.problem.q_heads))
        pictures = "".join(
            f'<figure style="display:inline-block;margin:4px"><img width="160" style="image-rendering:pixelated" '
            f'src="{self._native.picture(0, head, 128)}"><figcaption>head {head}: '
            f"{100 * statistics.head_density[head]:.1f} %</figcaption></figure>"
            for head in shown
        )
        text = self.explain().replace("&", "&amp;").replace("<", "&lt;")
        return f"<pre>{text}</pre>{pictures}"

    def __reduce__(self) -> tuple[Any, ...]:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "plan")
            self.save(path)
            with open(path, "rb") as file:
                return (_from_bytes, (file.read(),))


def _from_bytes(data: bytes) -> Plan:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "plan")
        with open(path, "wb") as file:
            file.write(data)
        return Plan.load(path)
