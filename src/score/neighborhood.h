// Neighbourhoods on one axis of a token grid (Generalized Neighborhood Attention, arXiv:2504.16922): which keys each
// query sees, and which queries see a key. On a grid a pair counts when every axis allows it.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

namespace tessera::score {

/// Half-open range of coordinates.
struct Interval {
  std::int64_t begin = 0;
  std::int64_t end = 0;
  std::int64_t size() const { return end - begin; }
  friend bool operator==(const Interval&, const Interval&) = default;
};

constexpr std::int64_t floor_div(std::int64_t a, std::int64_t b) {
  return a / b - (a % b != 0 && (a < 0) != (b < 0) ? 1 : 0);
}

/// One axis. Coordinate x belongs to the dilation group x mod dilation and lies there at x / dilation; only tokens of
/// one group see each other, and everything else counts inside the group.
struct NeighborhoodAxis {
  std::int64_t length = 1;
  std::int64_t window = 1;  ///< keys a query sees; even windows lean to the left; wider than the group: all of it
  std::int64_t stride = 1;  ///< so many queries in a row share one window; 1 to window
  std::int64_t dilation = 1;
  bool causal = false;

  std::int64_t groups() const { return std::min(dilation, length); }
  std::int64_t group_of(std::int64_t x) const { return x - floor_div(x, dilation) * dilation; }
  std::int64_t place_of(std::int64_t x) const { return floor_div(x, dilation); }
  std::int64_t coordinate(std::int64_t group, std::int64_t place) const { return place * dilation + group; }
  /// Coordinates of a group.
  std::int64_t length_of(std::int64_t group) const {
    return group < length ? (length - group + dilation - 1) / dilation : 0;
  }

  /// Places of the keys that the query at this place of a group of `n` places sees. The query may lie outside the
  /// group. Monotone in the place.
  Interval keys_of(std::int64_t place, std::int64_t n) const;
  /// Places of the queries that see the key at this place: the inverse map that a backward pass walks.
  Interval queries_of(std::int64_t place, std::int64_t n) const;
  /// Whether tiles of this shape need no mask on this axis: every key tile that a query tile visits is seen whole by
  /// all its queries. Walks the query tiles; a published closed form (stride a multiple of the query tile, window of
  /// the key tile, and where the first and last window begin) promises it too often, e.g. length 5, window 4, stride 1,
  /// tiles 1 and 2.
  bool block_sparse(std::int64_t tile_q, std::int64_t tile_k) const;
};

using Neighborhood = std::array<NeighborhoodAxis, 3>;

}  // namespace tessera::score
