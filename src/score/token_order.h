// Orders of the tokens of a grid in which neighbours on the grid become neighbours in memory: tiles, axis orders, a
// space-filling curve. Grid cells are counted in raster order (frames, rows, columns; columns fastest).
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "score/neighborhood.h"
#include "tessera/core.h"

namespace tessera::score {

using Extent = std::array<std::int64_t, 3>;

/// A box of cells that follow each other in a tiled order.
struct GridTile {
  Extent group{};                 ///< dilation group on each axis
  std::array<Interval, 3> box{};  ///< places inside the group
  std::int64_t begin = 0;         ///< first cell in the tiled order
  std::int64_t cells = 0;
};

/// The grid cut into tiles: dilation groups outermost, then tiles, then cells, each in raster order. Tiles at the end
/// of an axis are smaller when the tile does not divide it.
class GridTiling {
 public:
  GridTiling(const Extent& extent, const Extent& tile, const Extent& dilation = {1, 1, 1});

  const std::vector<GridTile>& tiles() const { return tiles_; }
  const Extent& tile() const { return tile_; }
  /// Index of the first tile of a dilation group, and its number of tiles on each axis.
  std::int64_t first_tile_of(const Extent& group) const { return first_tile_[group_index(group)]; }
  Extent counts_of(const Extent& group) const;
  /// Cells in the tiled order.
  std::vector<std::int32_t> order() const;

 private:
  std::int64_t group_index(const Extent& group) const {
    return (group[0] * groups_[1] + group[1]) * groups_[2] + group[2];
  }

  Extent extent_;
  Extent tile_;
  Extent dilation_;
  Extent groups_{};
  std::vector<GridTile> tiles_;
  std::vector<std::int64_t> first_tile_;
};

/// Cells with the axes nested as given, outermost first: {1, 2, 0} puts all frames of one pixel side by side.
std::vector<std::int32_t> axis_order(const Extent& extent, const std::array<int, 3>& axes);

/// Cells along the generalised Hilbert curve (Gilbert) through a box of any size: neighbours in the order touch on the
/// grid (at a corner at most, and only where a size is odd).
std::vector<std::int32_t> gilbert_order(const Extent& extent);

/// Order of all tokens: the cells in the given order, then the text before and after the grid.
std::vector<std::int32_t> with_text(const TokenGrid& grid, std::span<const std::int32_t> cells);

/// The queries of a sequence in the order of such tokens: indices of query rows.
std::vector<std::int32_t> queries_in_order(const Problem& problem, std::int64_t sequence,
                                           std::span<const std::int32_t> tokens);

/// Whether the order changes nothing.
bool is_identity(std::span<const std::int32_t> order);

}  // namespace tessera::score
