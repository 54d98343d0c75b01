#include "score/token_order.h"

#include <cstdlib>

namespace tessera::score {

namespace {

std::int64_t cell_of(const Extent& extent, std::int64_t t, std::int64_t h, std::int64_t w) {
  return (t * extent[1] + h) * extent[2] + w;
}

std::int64_t tiles_on(std::int64_t length, std::int64_t tile) {
  return (length + tile - 1) / tile;
}

/// A corner or an edge of the curve's boxes; components are columns, rows, frames.
struct Vector {
  std::array<std::int64_t, 3> x{};

  std::int64_t length() const { return std::abs(x[0]) + std::abs(x[1]) + std::abs(x[2]); }
  Vector sign() const {
    Vector s;
    for (int i = 0; i < 3; ++i) s.x[i] = (x[i] > 0 ? 1 : 0) - (x[i] < 0 ? 1 : 0);
    return s;
  }
  /// Half of it, rounded down; an odd half of a longer edge is made even by one step, so that the curve can join.
  Vector half() const {
    Vector h;
    for (int i = 0; i < 3; ++i) h.x[i] = floor_div(x[i], 2);
    if (h.length() % 2 != 0 && length() > 2) h = h + sign();
    return h;
  }
  friend Vector operator+(const Vector& a, const Vector& b) {
    return {{a.x[0] + b.x[0], a.x[1] + b.x[1], a.x[2] + b.x[2]}};
  }
  friend Vector operator-(const Vector& a) { return {{-a.x[0], -a.x[1], -a.x[2]}}; }
  friend Vector operator-(const Vector& a, const Vector& b) { return a + (-b); }
};

class Gilbert {
 public:
  explicit Gilbert(const Extent& extent) : extent_(extent) {
    const std::int64_t columns = extent[2];
    const std::int64_t rows = extent[1];
    const std::int64_t frames = extent[0];
    const Vector w{{columns, 0, 0}};
    const Vector h{{0, rows, 0}};
    const Vector d{{0, 0, frames}};
    order_.reserve(static_cast<std::size_t>(columns * rows * frames));
    if (columns >= rows && columns >= frames) {
      walk({}, w, h, d);
    } else if (rows >= columns && rows >= frames) {
      walk({}, h, w, d);
    } else {
      walk({}, d, w, h);
    }
  }

  std::vector<std::int32_t> take() { return std::move(order_); }

 private:
  void emit(const Vector& p) { order_.push_back(static_cast<std::int32_t>(cell_of(extent_, p.x[2], p.x[1], p.x[0]))); }
  void straight(Vector p, const Vector& edge) {
    const Vector step = edge.sign();
    for (std::int64_t i = edge.length(); i > 0; --i, p = p + step) emit(p);
  }

  /// Fills the box at corner p with edges a (the way to go), b, c.
  void walk(const Vector& p, const Vector& a, const Vector& b, const Vector& c) {  // NOLINT(misc-no-recursion)
    const std::int64_t w = a.length();
    const std::int64_t h = b.length();
    const std::int64_t d = c.length();
    if (h == 1 && d == 1) return straight(p, a);
    if (w == 1 && d == 1) return straight(p, b);
    if (w == 1 && h == 1) return straight(p, c);
    const Vector da = a.sign();
    const Vector db = b.sign();
    const Vector dc = c.sign();
    const Vector a2 = a.half();
    const Vector b2 = b.half();
    const Vector c2 = c.half();
    if (2 * w > 3 * h && 2 * w > 3 * d) {
      walk(p, a2, b, c);
      walk(p + a2, a - a2, b, c);
    } else if (3 * h > 4 * d) {
      walk(p, b2, c, a2);
      walk(p + b2, a, b - b2, c);
      walk(p + (a - da) + (b2 - db), -b2, c, -(a - a2));
    } else if (3 * d > 4 * h) {
      walk(p, c2, a2, b);
      walk(p + c2, a, b, c - c2);
      walk(p + (a - da) + (c2 - dc), -c2, -(a - a2), b);
    } else {
      walk(p, b2, c2, a2);
      walk(p + b2, c, a2, b - b2);
      walk(p + (b2 - db) + (c - dc), a, -b2, -(c - c2));
      walk(p + (a - da) + b2 + (c - dc), -c, -(a - a2), b - b2);
      walk(p + (a - da) + (b2 - db), -b2, c2, -(a - a2));
    }
  }

  Extent extent_;
  std::vector<std::int32_t> order_;
};

}  // namespace

GridTiling::GridTiling(const Extent& extent, const Extent& tile, const Extent& dilation)
    : extent_(extent), tile_(tile), dilation_(dilation) {
  for (int a = 0; a < 3; ++a) groups_[a] = std::min(dilation[a], extent[a]);
  std::int64_t begin = 0;
  Extent group{};
  for (group[0] = 0; group[0] < groups_[0]; ++group[0]) {
    for (group[1] = 0; group[1] < groups_[1]; ++group[1]) {
      for (group[2] = 0; group[2] < groups_[2]; ++group[2]) {
        first_tile_.push_back(static_cast<std::int64_t>(tiles_.size()));
        const Extent counts = counts_of(group);
        for (std::int64_t i = 0; i < counts[0] * counts[1] * counts[2]; ++i) {
          const Extent at{i / (counts[1] * counts[2]), i / counts[2] % counts[1], i % counts[2]};
          GridTile next;
          next.group = group;
          next.begin = begin;
          next.cells = 1;
          for (int a = 0; a < 3; ++a) {
            const NeighborhoodAxis axis{.length = extent[a], .dilation = dilation[a]};
            next.box[a] = {at[a] * tile[a], std::min((at[a] + 1) * tile[a], axis.length_of(group[a]))};
            next.cells *= next.box[a].size();
          }
          begin += next.cells;
          tiles_.push_back(next);
        }
      }
    }
  }
}

Extent GridTiling::counts_of(const Extent& group) const {
  Extent counts{};
  for (int a = 0; a < 3; ++a) {
    const NeighborhoodAxis axis{.length = extent_[a], .dilation = dilation_[a]};
    counts[a] = tiles_on(axis.length_of(group[a]), tile_[a]);
  }
  return counts;
}

std::vector<std::int32_t> GridTiling::order() const {
  std::vector<std::int32_t> cells;
  cells.reserve(static_cast<std::size_t>(extent_[0] * extent_[1] * extent_[2]));
  for (const GridTile& tile : tiles_) {
    for (std::int64_t t = tile.box[0].begin; t < tile.box[0].end; ++t) {
      for (std::int64_t h = tile.box[1].begin; h < tile.box[1].end; ++h) {
        for (std::int64_t w = tile.box[2].begin; w < tile.box[2].end; ++w) {
          cells.push_back(
              static_cast<std::int32_t>(cell_of(extent_, t * dilation_[0] + tile.group[0],
                                                h * dilation_[1] + tile.group[1], w * dilation_[2] + tile.group[2])));
        }
      }
    }
  }
  return cells;
}

std::vector<std::int32_t> axis_order(const Extent& extent, const std::array<int, 3>& axes) {
  std::vector<std::int32_t> cells;
  cells.reserve(static_cast<std::size_t>(extent[0] * extent[1] * extent[2]));
  Extent at{};
  for (at[axes[0]] = 0; at[axes[0]] < extent[axes[0]]; ++at[axes[0]]) {
    for (at[axes[1]] = 0; at[axes[1]] < extent[axes[1]]; ++at[axes[1]]) {
      for (at[axes[2]] = 0; at[axes[2]] < extent[axes[2]]; ++at[axes[2]]) {
        cells.push_back(static_cast<std::int32_t>(cell_of(extent, at[0], at[1], at[2])));
      }
    }
  }
  return cells;
}

std::vector<std::int32_t> gilbert_order(const Extent& extent) {
  return extent[0] * extent[1] * extent[2] == 0 ? std::vector<std::int32_t>{} : Gilbert(extent).take();
}

std::vector<std::int32_t> with_text(const TokenGrid& grid, std::span<const std::int32_t> cells) {
  std::vector<std::int32_t> tokens;
  tokens.reserve(static_cast<std::size_t>(grid.tokens()));
  for (const std::int32_t cell : cells) tokens.push_back(static_cast<std::int32_t>(cell + grid.prefix));
  for (std::int64_t i = 0; i < grid.prefix; ++i) tokens.push_back(static_cast<std::int32_t>(i));
  for (std::int64_t i = grid.prefix + grid.cells(); i < grid.tokens(); ++i) {
    tokens.push_back(static_cast<std::int32_t>(i));
  }
  return tokens;
}

std::vector<std::int32_t> queries_in_order(const Problem& problem, std::int64_t sequence,
                                           std::span<const std::int32_t> tokens) {
  const std::int64_t offset = problem.q_offset_of(sequence);
  const std::int64_t queries = problem.q_len_of(sequence);
  std::vector<std::int32_t> order;
  order.reserve(static_cast<std::size_t>(queries));
  for (const std::int32_t token : tokens) {
    if (token >= offset && token < offset + queries) order.push_back(static_cast<std::int32_t>(token - offset));
  }
  if (static_cast<std::int64_t>(order.size()) == queries) return order;
  // Without a grid, queries may sit before the first key or behind the last one.
  const auto keys = static_cast<std::int64_t>(tokens.size());
  for (std::int64_t i = 0; i < queries; ++i) {
    if (i + offset < 0 || i + offset >= keys) order.push_back(static_cast<std::int32_t>(i));
  }
  return order;
}

bool is_identity(std::span<const std::int32_t> order) {
  for (std::size_t i = 0; i < order.size(); ++i) {
    if (order[i] != static_cast<std::int32_t>(i)) return false;
  }
  return true;
}

}  // namespace tessera::score
