// What a neighbourhood pattern costs once it is cut into tiles, from arithmetic alone: the simulator of Generalized
// Neighborhood Attention (arXiv:2504.16922). It chooses tile shapes and strides; no tensor is touched.
#pragma once

#include <vector>

#include "score/neighborhood.h"
#include "score/token_order.h"

namespace tessera::score {

struct TileShapes {
  Extent q{1, 1, 1};
  Extent k{1, 1, 1};
  friend bool operator==(const TileShapes&, const TileShapes&) = default;
};

/// Where key tiles begin.
enum class Tiling : std::uint8_t {
  fixed,   ///< at multiples of the tile ("static"): what plans with one key order can do
  dynamic  ///< at the first key that the query tile sees
};

/// Costs of one head over the whole grid.
struct NeighborhoodCost {
  std::int64_t dense_tiles = 0;    ///< key tiles of the grid
  std::int64_t most_visited = 0;   ///< key tiles that the worst query tile visits
  double mean_visited = 0;         ///< over the query tiles
  std::int64_t visited_pairs = 0;  ///< queries x keys of the visited tiles: the executed pairs of a plan
  std::int64_t pairs = 0;          ///< pairs that the mask keeps
  bool block_sparse = false;       ///< no tile needs a mask

  /// Upper bounds of the speed-up over dense: by the worst tile, by the mean tile, by arithmetic without tiles.
  double speedup() const { return static_cast<double>(dense_tiles) / static_cast<double>(most_visited); }
  double mean_speedup() const { return static_cast<double>(dense_tiles) / mean_visited; }
  double flop_speedup = 0;
};

NeighborhoodCost simulate(const Neighborhood& axes, const TileShapes& tiles, Tiling tiling = Tiling::fixed);

/// Speed-up of a whole run when attention is this share of its time (times the share of steps that use it).
constexpr double end_to_end_speedup(double attention_share, double speedup) {
  return 1 / ((1 - attention_share) + attention_share / speedup);
}

/// Strides of one axis that are worth taking: with each, the worst query tile visits fewer key tiles than with every
/// smaller stride. Larger strides cost translation equivariance, so that of equal ones the smallest is kept.
struct StrideOption {
  std::int64_t stride = 1;
  std::int64_t most_visited = 0;
};
std::vector<StrideOption> stride_options(NeighborhoodAxis axis, std::int64_t tile_q, std::int64_t tile_k,
                                         Tiling tiling = Tiling::fixed);

/// Tile shapes of at most these sizes with the least estimated cost. Query tiles divide the grid where they can, so
/// that consecutive queries of a plan row never straddle two of them.
TileShapes choose_tiles(const Neighborhood& axes, std::int64_t most_queries, std::int64_t most_keys);

}  // namespace tessera::score
