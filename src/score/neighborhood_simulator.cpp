#include "score/neighborhood_simulator.h"

#include <limits>
#include <map>
#include <utility>

namespace tessera::score {

namespace {

/// Sums over the query tiles of one axis. Tiles of a grid are products, so that sums over them are too.
struct AxisCost {
  std::int64_t query_tiles = 0;
  std::int64_t key_tiles = 0;
  std::int64_t most_visited = 0;
  std::int64_t visited = 0;        // key tiles
  std::int64_t visited_rows = 0;   // key tiles x queries
  std::int64_t visited_pairs = 0;  // keys of the tiles x queries
};

AxisCost axis_cost(const NeighborhoodAxis& axis, std::int64_t tile_q, std::int64_t tile_k, Tiling tiling) {
  AxisCost cost;
  for (std::int64_t group = 0; group < axis.groups(); ++group) {
    const std::int64_t n = axis.length_of(group);
    cost.key_tiles += (n + tile_k - 1) / tile_k;
    for (std::int64_t first = 0; first < n; first += tile_q) {
      const std::int64_t last = std::min(first + tile_q, n) - 1;
      const Interval keys{axis.keys_of(first, n).begin, axis.keys_of(last, n).end};
      const std::int64_t begin = tiling == Tiling::fixed ? keys.begin / tile_k * tile_k : keys.begin;
      const std::int64_t tiles = (keys.end - begin + tile_k - 1) / tile_k;
      const std::int64_t rows = last - first + 1;
      ++cost.query_tiles;
      cost.most_visited = std::max(cost.most_visited, tiles);
      cost.visited += tiles;
      cost.visited_rows += tiles * rows;
      cost.visited_pairs += (std::min(begin + tiles * tile_k, n) - begin) * rows;
    }
  }
  return cost;
}

std::int64_t axis_pairs(const NeighborhoodAxis& axis) {
  std::int64_t pairs = 0;
  for (std::int64_t group = 0; group < axis.groups(); ++group) {
    const std::int64_t n = axis.length_of(group);
    for (std::int64_t place = 0; place < n; ++place) pairs += axis.keys_of(place, n).size();
  }
  return pairs;
}

std::vector<std::int64_t> divisors_up_to(std::int64_t value, std::int64_t most) {
  std::vector<std::int64_t> divisors;
  for (std::int64_t d = 1; d <= std::min(value, most); ++d) {
    if (value % d == 0) divisors.push_back(d);
  }
  return divisors;
}

/// All shapes from these sizes per axis with at most so many cells.
std::vector<Extent> shapes_of(const std::array<std::vector<std::int64_t>, 3>& sizes, std::int64_t most) {
  std::vector<Extent> shapes;
  for (const std::int64_t t : sizes[0]) {
    for (const std::int64_t h : sizes[1]) {
      for (const std::int64_t w : sizes[2]) {
        if (t * h * w <= most) shapes.push_back({t, h, w});
      }
    }
  }
  return shapes;
}

std::int64_t cells_of(const Extent& shape) {
  return shape[0] * shape[1] * shape[2];
}

/// Drops shapes below half of the largest one: small tiles waste what they pack.
void drop_small(std::vector<Extent>& shapes) {
  std::int64_t largest = 1;
  for (const Extent& shape : shapes) largest = std::max(largest, cells_of(shape));
  std::erase_if(shapes, [&](const Extent& shape) { return 2 * cells_of(shape) <= largest; });
}

}  // namespace

NeighborhoodCost simulate(const Neighborhood& axes, const TileShapes& tiles, Tiling tiling) {
  NeighborhoodCost cost;
  cost.dense_tiles = cost.most_visited = cost.visited_pairs = cost.pairs = 1;
  cost.mean_visited = cost.flop_speedup = 1;
  cost.block_sparse = true;
  for (int a = 0; a < 3; ++a) {
    const AxisCost axis = axis_cost(axes[a], tiles.q[a], tiles.k[a], tiling);
    cost.dense_tiles *= axis.key_tiles;
    cost.most_visited *= axis.most_visited;
    cost.mean_visited *= static_cast<double>(axis.visited) / static_cast<double>(axis.query_tiles);
    cost.visited_pairs *= axis.visited_pairs;
    cost.pairs *= axis_pairs(axes[a]);
    cost.flop_speedup *=
        static_cast<double>(axes[a].length) / static_cast<double>(std::min(axes[a].window, axes[a].length));
    cost.block_sparse = cost.block_sparse && axes[a].block_sparse(tiles.q[a], tiles.k[a]);
  }
  return cost;
}

std::vector<StrideOption> stride_options(NeighborhoodAxis axis, std::int64_t tile_q, std::int64_t tile_k,
                                         Tiling tiling) {
  std::vector<StrideOption> options;
  const std::int64_t largest = std::min(axis.window, axis.length);
  for (axis.stride = 1; axis.stride <= largest; ++axis.stride) {
    const std::int64_t visited = axis_cost(axis, tile_q, tile_k, tiling).most_visited;
    if (options.empty() || visited < options.back().most_visited) options.push_back({axis.stride, visited});
  }
  return options;
}

TileShapes choose_tiles(const Neighborhood& axes, std::int64_t most_queries, std::int64_t most_keys) {
  // What a key tile costs a query tile beside its pairs: as much as so many more query rows (packing) and keys (entry).
  constexpr std::int64_t packing_rows = 24;
  constexpr std::int64_t entry_keys = 2;
  constexpr std::int64_t lanes = 16;  // kernels multiply so many keys at a time

  std::array<std::vector<std::int64_t>, 3> q_sizes;
  std::array<std::vector<std::int64_t>, 3> k_sizes;
  for (int a = 0; a < 3; ++a) {
    const std::int64_t n = axes[a].length_of(0);
    q_sizes[a] = divisors_up_to(n, most_queries);
    k_sizes[a] = divisors_up_to(n, most_keys);
    for (std::int64_t size = 2; size <= std::min(n, most_keys); size *= 2) {
      if (n % size != 0) k_sizes[a].push_back(size);
    }
    // On the outermost axis that is longer than one cell only the last tile can be ragged: any size will do.
    const bool outermost = (a < 1 || axes[0].length == 1) && (a < 2 || axes[1].length == 1);
    if (!outermost || axes[a].length == 1) continue;
    for (std::int64_t size = 2; size <= std::min(n, most_queries); size *= 2) {
      if (n % size != 0) q_sizes[a].push_back(size);
    }
  }
  std::vector<Extent> q_shapes = shapes_of(q_sizes, most_queries);
  std::vector<Extent> k_shapes = shapes_of(k_sizes, most_keys);
  drop_small(q_shapes);

  std::array<std::map<std::pair<std::int64_t, std::int64_t>, AxisCost>, 3> known;
  const auto cost_on = [&](int a, std::int64_t q, std::int64_t k) -> const AxisCost& {
    const auto [entry, fresh] = known[a].try_emplace({q, k});
    if (fresh) entry->second = axis_cost(axes[a], q, k, Tiling::fixed);
    return entry->second;
  };
  TileShapes best;
  double least = std::numeric_limits<double>::infinity();
  for (const Extent& k : k_shapes) {
    const std::int64_t tile_keys = (cells_of(k) + lanes - 1) / lanes * lanes + entry_keys;
    for (const Extent& q : q_shapes) {
      double with_rows = 1;
      double once = 1;
      for (int a = 0; a < 3; ++a) {
        const AxisCost& axis = cost_on(a, q[a], k[a]);
        with_rows *= static_cast<double>(axis.visited_rows);
        once *= static_cast<double>(axis.visited);
      }
      const double cost = (with_rows + packing_rows * once) * static_cast<double>(tile_keys);
      if (cost < least) {
        least = cost;
        best = {q, k};
      }
    }
  }
  return best;
}

}  // namespace tessera::score
