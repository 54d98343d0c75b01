// Rows of a plan as separate values, so that threads fill them in any order; joined into a plan at the end.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "core/parallel.h"
#include "score/query_tiles.h"
#include "tessera/plan.h"

namespace tessera::score {

/// The entries of one query tile. Offsets of gather lists and bitmasks count in this row's
/// own pools.
struct PlanRow {
  std::vector<PlanEntry> entries;
  std::vector<std::int32_t> tokens;
  std::vector<std::uint64_t> mask_words;

  /// Keys [first, end); nothing when empty.
  void run(std::int64_t first, std::int64_t end, EntryMask mask = EntryMask::none, std::int64_t mask_index = 0);
  /// Key tiles [first, end).
  void tiles(std::int64_t first, std::int64_t end, EntryMask mask = EntryMask::none);
  /// Single keys, ascending.
  void gather(std::span<const std::int32_t> keys, EntryMask mask = EntryMask::none, std::int64_t mask_index = 0);
  /// Keys [first, end) with bits (row, key - first).
  void bits(std::int64_t first, std::int64_t end, std::span<const std::uint64_t> words);

  /// Everything the hard mask lets the query tile see.
  void everything(const QueryTiles& geometry, std::int64_t tile);
  /// The given key tiles (ascending, visible), neighbours merged; causal masking only where rows differ.
  void selected_tiles(const QueryTiles& geometry, std::int64_t tile, std::span<const std::int32_t> selected);
  /// The key tiles j < flags.size() with flags[j] != 0.
  void flagged_tiles(const QueryTiles& geometry, std::int64_t tile, std::span<const std::uint8_t> flags);
  /// The given keys (ascending, visible): long stretches as runs, the rest as one gather; causal where
  /// rows differ.
  void selected_keys(const QueryTiles& geometry, std::int64_t tile, std::span<const std::int32_t> selected);
  /// Keys [first, end), end clipped to what the tile may see; causal masking only where rows differ.
  void visible_run(const QueryTiles& geometry, std::int64_t tile, std::int64_t first, std::int64_t end);
};

/// All rows of a plan in the making. plan_heads is 1, kv_heads or q_heads; every sequence has its own rows unless
/// `share_sequences`, which needs a uniform batch.
class PlanRows {
 public:
  PlanRows(const Problem& problem, std::int64_t tile_q, std::int64_t tile_k, std::int64_t plan_heads,
           bool share_sequences = false);

  std::int64_t blocks() const { return plan_heads_ * plan_sequences_; }
  std::int64_t sequence_of(std::int64_t block) const { return block / plan_heads_; }
  /// First query head of the block.
  std::int64_t head_of(std::int64_t block) const { return block % plan_heads_ * (problem_.q_heads / plan_heads_); }
  QueryTiles geometry(std::int64_t block) const { return {problem_, sequence_of(block), tile_q_, tile_k_}; }
  PlanRow& row(std::int64_t block, std::int64_t tile) { return rows_[first_row_[block] + tile]; }

  /// Index of a band for EntryMask::band; before rows are filled.
  std::int64_t add_band(Window band);

  /// body(block, first tile, tiles, thread) for groups of consecutive query tiles, later tiles first: with causality
  /// they are the longest.
  template <class Body>
  void for_each_band(std::int64_t tiles_per_band, int threads, const Body& body) const {
    std::int64_t bands = 0;
    for (std::int64_t b = 0; b < blocks(); ++b) {
      bands = std::max(bands, (geometry(b).count() + tiles_per_band - 1) / tiles_per_band);
    }
    parallel_for(bands * blocks(), threads, [&](std::int64_t i, int thread) {
      const std::int64_t block = i % blocks();
      const std::int64_t first = (bands - 1 - i / blocks()) * tiles_per_band;
      const std::int64_t count = std::min(tiles_per_band, geometry(block).count() - first);
      if (count > 0) body(block, first, count, thread);
    });
  }

  /// The plan; blocks are written in parallel and joined in order.
  Plan finish(int threads) &&;

 private:
  Problem problem_;
  std::int64_t tile_q_;
  std::int64_t tile_k_;
  std::int64_t plan_heads_;
  std::int64_t plan_sequences_;
  std::vector<std::int64_t> first_row_;
  std::vector<PlanRow> rows_;
  std::vector<Window> bands_{{-1, 0}};
};

}  // namespace tessera::score
