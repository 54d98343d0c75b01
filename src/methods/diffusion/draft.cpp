// DraftAttention, arXiv:2505.14708: attention at low resolution decides which regions of a video see each other.
//
// Queries and keys are averaged over regions of each frame; the draft map is the softmax of region against region. One
// threshold per head over the whole map, not per row, keeps its largest entries: the k-th smallest value with
// k = int(sparsity * entries), so that ties keep more. Tokens are reordered region by region, and a kept entry is a
// dense tile. Text keys are kept for every query and text queries see everything.
//
// Differs from the authors' code: grids need not divide by the region, regions at the edge are smaller and their means
// divide by their own tokens; every row keeps its largest entry; on a plain sequence a region is a stretch of as many
// tokens.
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "core/error.h"
#include "core/parallel.h"
#include "methods/axis_values.h"
#include "methods/registry.h"
#include "score/ordered_tiles.h"
#include "score/product.h"
#include "score/token_order.h"

namespace tessera {
namespace {

using score::Extent;
using score::GridTile;
using score::GridTiling;
using score::OrderedTiles;

/// Text tokens belong to no region.
constexpr std::int32_t kText = -1;

/// A sequence cut into regions, its tokens in their order.
struct Regions {
  Regions(const Problem& problem, std::int64_t sequence, const Extent& shape)
      : grid(problem.grid_of(sequence)),
        tiling(grid.extent, shape),
        tile_q(std::max<std::int64_t>(1, std::min(shape[1], grid.extent[1]) * std::min(shape[2], grid.extent[2]))),
        tokens(problem, sequence, score::with_text(grid, tiling.order()), tile_q, tile_q) {
    std::vector<std::int32_t> of_cell(static_cast<std::size_t>(grid.cells()));
    const std::vector<std::int32_t> cells = tiling.order();
    for (std::size_t t = 0; t < tiling.tiles().size(); ++t) {
      const GridTile& tile = tiling.tiles()[t];
      for (std::int64_t i = tile.begin; i < tile.begin + tile.cells; ++i) {
        of_cell[cells[i]] = static_cast<std::int32_t>(t);
      }
    }
    for (std::int64_t place = 0; place < tokens.queries(); ++place) {
      std::int64_t cell = tokens.query_position(place) - grid.prefix;
      if (!problem.grid) cell = std::clamp<std::int64_t>(cell, 0, grid.cells() - 1);  // queries beyond the keys
      of_query.push_back(cell >= 0 && cell < grid.cells() ? of_cell[cell] : kText);
    }
  }

  std::int64_t count() const { return static_cast<std::int64_t>(tiling.tiles().size()); }

  TokenGrid grid;
  GridTiling tiling;
  std::int64_t tile_q;
  OrderedTiles tokens;
  std::vector<std::int32_t> of_query;  ///< region of each query place, or kText
};

/// Mean rows of regions: load(first place, count, out) of `places` rows in all, region_of(place).
template <class Load, class RegionOf>
std::vector<float> means_of(std::int64_t regions, std::int64_t places, std::int64_t dim, const Load& load,
                            const RegionOf& region_of, std::vector<std::int64_t>& members) {
  constexpr std::int64_t rows_at_once = 256;
  std::vector<float> rows(static_cast<std::size_t>(rows_at_once * dim));
  std::vector<double> sums(static_cast<std::size_t>(regions * dim), 0.0);
  members.assign(static_cast<std::size_t>(regions), 0);
  for (std::int64_t first = 0; first < places; first += rows_at_once) {
    const std::int64_t count = std::min(rows_at_once, places - first);
    load(first, count, rows.data());
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int32_t region = region_of(first + i);
      if (region == kText) continue;
      ++members[region];
      for (std::int64_t d = 0; d < dim; ++d) sums[region * dim + d] += rows[i * dim + d];
    }
  }
  std::vector<float> means(sums.size());
  for (std::size_t i = 0; i < sums.size(); ++i) {
    const auto count = static_cast<double>(std::max<std::int64_t>(1, members[i / static_cast<std::size_t>(dim)]));
    means[i] = static_cast<float>(sums[i] / count);
  }
  return means;
}

class Draft {
 public:
  struct Params {
    std::string region = "8x16";
    double sparsity = 0.9;
    void visit(ParameterList& v) {
      v("region", region, "rows x columns of a frame that are averaged and become one tile");
      v("sparsity", sparsity, 0, 1, "share of the draft map that is left out");
    }
  };
  static MethodInfo info() {
    return {.name = "draft",
            .family = "diffusion",
            .summary = "attention between averaged regions of frames decides which regions see each other",
            .paper = "DraftAttention: Fast Video Diffusion via Low-Resolution Attention Guidance, arXiv:2505.14708",
            .phases = {.prefill = true, .decode = false},
            .domain = {.causal = false, .reason = "the means of a region would mix in later tokens"},
            .budget = {{"sparsity", 1, 0}}};
  }

  explicit Draft(Params params)
      : params_(std::move(params)), region_(axis_values("draft", "region", params_.region, 1, 1)) {
    require(region_[0] == 1, "draft: region is '{}'; expected rows x columns of one frame", params_.region);
    require(region_[1] <= most_tile_side && region_[2] <= most_tile_side,
            "draft: region is '{}'; expected at most {} x {}", params_.region, most_tile_side, most_tile_side);
  }

  Plan plan(const Problem& problem, const AttentionInputs& inputs, const PlanContext& context) const {
    std::vector<Regions> sequences;
    sequences.reserve(static_cast<std::size_t>(problem.batch));
    for (std::int64_t s = 0; s < problem.batch; ++s) {
      sequences.emplace_back(problem, s, shape_on(problem.grid_of(s)));
    }
    std::int64_t tile = 1;  // variable lengths below a region may differ; rows then straddle regions
    for (const Regions& regions : sequences) tile = std::max(tile, regions.tile_q);
    std::vector<Plan> parts(static_cast<std::size_t>(problem.batch * problem.q_heads));
    parallel_for(static_cast<std::int64_t>(parts.size()), context.run.threads, [&](std::int64_t block, int) {
      parts[block] = block_plan(problem, inputs, sequences[block / problem.q_heads], tile, block);
    });
    return concatenate_blocks(problem, problem.q_heads, problem.batch, parts);
  }

 private:
  static constexpr std::int64_t most_tile_side = 1024;

  Extent shape_on(const TokenGrid& grid) const {
    const bool plain = grid.extent[0] == 1 && grid.extent[1] == 1;
    return plain ? Extent{1, 1, region_[1] * region_[2]} : region_;
  }

  /// Which key regions each query region keeps: [regions][regions].
  std::vector<std::uint8_t> kept_entries(const Problem& problem, const AttentionInputs& inputs, const Regions& regions,
                                         std::int64_t head) const {
    const std::int64_t count = regions.count();
    const std::int64_t dim = problem.head_dim;
    std::vector<std::int64_t> query_members;
    std::vector<std::int64_t> key_members;
    const std::vector<float> queries = means_of(
        count, regions.tokens.queries(), dim,
        [&](std::int64_t first, std::int64_t rows, float* out) {
          regions.tokens.load_queries(problem, inputs, head, first, rows, out);
        },
        [&](std::int64_t place) { return regions.of_query[place]; }, query_members);
    std::int64_t tile = 0;
    const std::vector<float> keys = means_of(
        count, regions.grid.cells(), dim,
        [&](std::int64_t first, std::int64_t rows, float* out) {
          regions.tokens.load_keys(problem, inputs, head / problem.group(), first, rows, out);
        },
        [&](std::int64_t place) {
          const std::vector<GridTile>& tiles = regions.tiling.tiles();
          while (place >= tiles[tile].begin + tiles[tile].cells) ++tile;
          return static_cast<std::int32_t>(tile);
        },
        key_members);

    std::vector<float> map(static_cast<std::size_t>(count * count));
    if (count > 0) {
      score::multiply_transposed(queries.data(), count, dim, keys.data(), count, dim, dim, problem.softmax_scale(),
                                 map.data(), count);
    }
    std::vector<float> values;  // of the regions that hold queries
    for (std::int64_t i = 0; i < count; ++i) {
      if (query_members[i] == 0) continue;
      const std::span<float> row(map.data() + i * count, static_cast<std::size_t>(count));
      softmax(row);
      values.insert(values.end(), row.begin(), row.end());
    }
    const auto dropped = static_cast<std::int64_t>(params_.sparsity * static_cast<double>(values.size()));
    float threshold = 0;
    if (dropped > 0) {
      std::nth_element(values.begin(), values.begin() + (dropped - 1), values.end());
      threshold = values[dropped - 1];
    }
    std::vector<std::uint8_t> kept(map.size(), 0);
    for (std::int64_t i = 0; i < count; ++i) {
      const std::span<const float> row(map.data() + i * count, static_cast<std::size_t>(count));
      for (std::int64_t j = 0; j < count; ++j) kept[i * count + j] = row[j] >= threshold ? 1 : 0;
      kept[i * count + (std::max_element(row.begin(), row.end()) - row.begin())] = 1;
    }
    return kept;
  }

  /// Undefined scores become infinite: their regions are kept.
  static void softmax(std::span<float> row) {
    constexpr float infinity = std::numeric_limits<float>::infinity();
    for (float& x : row) x = std::isnan(x) ? infinity : x;
    const float most = *std::max_element(row.begin(), row.end());
    if (!std::isfinite(most)) {
      for (float& x : row) x = x == most ? infinity : 0.0F;
      return;
    }
    float sum = 0;
    for (float& x : row) sum += x = std::exp(x - most);
    for (float& x : row) x /= sum;
  }

  Plan block_plan(const Problem& problem, const AttentionInputs& inputs, const Regions& regions, std::int64_t tile,
                  std::int64_t block) const {
    PlanBuilder builder = PlanBuilder::for_block(problem, tile, tile, problem.q_heads, problem.batch, block);
    regions.tokens.set_orders(builder, block);
    const std::vector<std::uint8_t> kept = kept_entries(problem, inputs, regions, block % problem.q_heads);
    const std::int64_t queries = regions.tokens.queries();
    for (std::int64_t first = 0; first < queries; first += tile) {
      const auto rows = std::span(regions.of_query).subspan(first, std::min(tile, queries - first));
      add_row(builder, regions, kept, rows);
      builder.end_row();
    }
    return std::move(builder).finish();
  }

  /// Kept regions as runs; a row that straddles regions of queries has bitmasks where they disagree.
  static void add_row(PlanBuilder& builder, const Regions& regions, std::span<const std::uint8_t> kept,
                      std::span<const std::int32_t> rows) {
    const std::int64_t count = regions.count();
    const auto keeps = [&](std::int32_t query, std::int64_t key) {
      return query == kText || kept[query * count + key] != 0;
    };
    std::int64_t begin = 0;
    std::int64_t end = 0;
    const auto flush = [&] {
      builder.run(begin, end - begin);
      begin = end = 0;
    };
    for (std::int64_t j = 0; j < count; ++j) {
      const GridTile& tile = regions.tiling.tiles()[j];
      std::int64_t votes = 0;
      for (const std::int32_t region : rows) votes += keeps(region, j) ? 1 : 0;
      if (votes == 0) continue;
      if (votes < static_cast<std::int64_t>(rows.size())) {
        flush();
        const std::int64_t words = (tile.cells + 63) / 64;
        std::vector<std::uint64_t> bits(rows.size() * static_cast<std::size_t>(words), 0);
        for (std::size_t r = 0; r < rows.size(); ++r) {
          for (std::int64_t i = 0; keeps(rows[r], j) && i < tile.cells; ++i) {
            bits[r * words + i / 64] |= std::uint64_t{1} << (i % 64);
          }
        }
        builder.run(tile.begin, tile.cells, EntryMask::bitmask, builder.add_mask(bits));
        continue;
      }
      if (end != tile.begin) {
        flush();
        begin = tile.begin;
      }
      end = tile.begin + tile.cells;
    }
    flush();
    builder.run(regions.grid.cells(), regions.grid.prefix + regions.grid.suffix);
  }

  Params params_;
  Extent region_;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(draft, tessera::Draft);
