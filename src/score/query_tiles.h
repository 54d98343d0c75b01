// Where the query tiles of a sequence lie among its keys: positions, and what the hard mask lets them see.
#pragma once

#include <algorithm>
#include <cstdint>

#include "tessera/core.h"

namespace tessera::score {

/// Query tile i holds rows [i * tile_q, ...); row r has position q_offset + r. Key tile j holds keys [j * tile_k, ...).
struct QueryTiles {
  std::int64_t queries = 0;
  std::int64_t keys = 0;
  std::int64_t offset = 0;  ///< position of query 0
  std::int64_t tile_q = 0;
  std::int64_t tile_k = 0;
  bool causal = false;

  QueryTiles(const Problem& problem, std::int64_t sequence, std::int64_t query_tile, std::int64_t key_tile)
      : queries(problem.q_len_of(sequence)),
        keys(problem.kv_len_of(sequence)),
        offset(problem.q_offset_of(sequence)),
        tile_q(query_tile),
        tile_k(key_tile),
        causal(problem.causal) {}

  std::int64_t count() const { return (queries + tile_q - 1) / tile_q; }
  std::int64_t key_tiles() const { return (keys + tile_k - 1) / tile_k; }
  std::int64_t rows(std::int64_t tile) const { return std::min(tile_q, queries - tile * tile_q); }
  std::int64_t first_position(std::int64_t tile) const { return offset + tile * tile_q; }
  std::int64_t last_position(std::int64_t tile) const { return first_position(tile) + rows(tile) - 1; }

  /// Keys [0, n) that a query at this position may see.
  std::int64_t keys_visible_from(std::int64_t position) const {
    return causal ? std::clamp<std::int64_t>(position + 1, 0, keys) : keys;
  }
  /// Keys that some row of the tile may see, and that every row may see.
  std::int64_t visible_keys(std::int64_t tile) const { return keys_visible_from(last_position(tile)); }
  std::int64_t common_keys(std::int64_t tile) const { return keys_visible_from(first_position(tile)); }
  /// Key tiles with a key that some row may see.
  std::int64_t visible_tiles(std::int64_t tile) const { return (visible_keys(tile) + tile_k - 1) / tile_k; }

  /// Key tiles [first, end) that hold the positions of the tile's own rows: two where tiles do not line up. Clamped to
  /// the visible tiles, so that a tile that sees any key has a diagonal.
  struct Range {
    std::int64_t first;
    std::int64_t end;
  };
  Range diagonal(std::int64_t tile) const {
    const std::int64_t end = visible_tiles(tile);
    if (end == 0) return {0, 0};
    const std::int64_t last = std::clamp<std::int64_t>(last_position(tile), 0, keys - 1) / tile_k;
    const std::int64_t first = std::clamp<std::int64_t>(first_position(tile), 0, keys - 1) / tile_k;
    return {std::min(first, end - 1), std::min(last + 1, end)};
  }
};

}  // namespace tessera::score
