// Plan rows of single queries from the key blocks they chose: whole tiles, so that the key-major kernel can run them.
#pragma once

#include <span>

#include "score/plan_rows.h"

namespace tessera::score {

/// Key block that holds the position of a query; -1 before the first key.
inline std::int64_t own_block(const QueryTiles& tiles, std::int64_t query) {
  const std::int64_t position = tiles.first_position(query);
  return position < 0 ? -1 : position / tiles.tile_k;
}

/// Adds the chosen blocks (ascending, visible) of a query to its row; neighbours share an entry. With causality the
/// query sees its own block up to itself. `tiles` has query tiles of one row.
inline void add_query_blocks(const QueryTiles& tiles, std::int64_t query, std::span<const std::int32_t> chosen,
                             PlanRow& row) {
  const std::int64_t own = tiles.causal ? own_block(tiles, query) : -1;
  for (std::size_t i = 0; i < chosen.size();) {
    std::size_t end = i + 1;
    const bool cut = chosen[i] == own;
    while (!cut && end < chosen.size() && chosen[end] == chosen[end - 1] + 1 && chosen[end] != own) ++end;
    row.tiles(chosen[i], chosen[end - 1] + 1, cut ? EntryMask::band : EntryMask::none);
    i = end;
  }
}

}  // namespace tessera::score
