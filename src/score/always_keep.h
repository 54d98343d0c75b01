// What is kept whatever the scores say: one description for all methods.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "score/query_tiles.h"

namespace tessera::score {

struct AlwaysKeep {
  std::int64_t sinks = 0;        ///< first keys of the sequence
  std::int64_t local = 0;        ///< keys at distance below this before the query (itself included)
  bool diagonal = true;          ///< the key tiles that hold the query tile's own positions
  std::int64_t last_rows = 0;    ///< query tiles that hold one of the last rows are dense
  std::int64_t dense_below = 0;  ///< sequences with fewer keys than this are dense

  /// For methods that declare these as parameters.
  template <class Visitor>
  void visit(Visitor& v) {
    constexpr std::int64_t most = 2147483647;
    v("sinks", sinks, 0, most, "first keys that every query keeps");
    v("local", local, 0, most, "nearest keys that every query keeps, itself included");
    v("diagonal", diagonal, "keep the query tile's own keys");
    v("last_rows", last_rows, 0, most, "query tiles that hold one of the last rows run dense");
    v("dense_below", dense_below, 0, most, "sequences with fewer keys run dense");
  }

  /// True when the whole query tile keeps everything it may see.
  bool dense(const QueryTiles& tiles, std::int64_t tile) const;

  /// forced[j] = 1 for the key tiles j < tiles.visible_tiles(tile) that are kept; size is that count.
  void force_tiles(const QueryTiles& tiles, std::int64_t tile, std::vector<std::uint8_t>& forced) const;

  /// forced[j] = 1 for the keys j < tiles.visible_keys(tile) that some row of the tile keeps.
  void force_keys(const QueryTiles& tiles, std::int64_t tile, std::vector<std::uint8_t>& forced) const;
};

}  // namespace tessera::score
