#include "score/tile_mass.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <limits>

#include "score/exponential.h"
#include "score/product.h"
#include "score/row_access.h"

namespace tessera::score {

namespace {

constexpr std::int64_t kPanelRows = 256;  // groups of queries and of keys in one matrix product

std::int64_t ceil_division(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

/// Joined queries, each group of `stride` rows in reverse order, of every `step`-th group; rows past the end are zero.
void load_reversed_groups(const Problem& problem, const AttentionInputs& inputs, std::int64_t sequence,
                          std::int64_t q_head, std::int64_t first, std::int64_t rows, std::int64_t stride,
                          std::int64_t step, std::vector<float>& out) {
  const std::int64_t dim = problem.head_dim;
  const std::int64_t groups = ceil_division(rows, stride * step);
  out.assign(static_cast<std::size_t>(groups * stride * dim), 0.0F);
  if (step == 1) {
    load_queries(problem, inputs, sequence, q_head, first, rows, out.data());
  } else {
    for (std::int64_t g = 0; g < groups; ++g) {
      const std::int64_t at = g * stride * step;
      load_queries(problem, inputs, sequence, q_head, first + at, std::min(stride, rows - at),
                   out.data() + g * stride * dim);
    }
  }
  if (stride == 1) return;
  for (std::int64_t g = 0; g < groups; ++g) {
    float* group = out.data() + g * stride * dim;
    for (std::int64_t i = 0; i < stride / 2; ++i) {
      std::swap_ranges(group + i * dim, group + (i + 1) * dim, group + (stride - 1 - i) * dim);
    }
  }
}

}  // namespace

std::int64_t tiles_per_band(const TileMassOptions& options) {
  return std::max<std::int64_t>(1, kPanelRows * options.stride * options.query_step / options.tile_q);
}

void tile_mass(const Problem& problem, const AttentionInputs& inputs, std::int64_t sequence, std::int64_t q_head,
               const TileMassOptions& options, std::int64_t first_tile, std::int64_t tiles, std::span<float> mass,
               TileMassBuffers& buffers) {
  const std::int64_t stride = options.stride;
  const std::int64_t group_rows = stride * options.query_step;  // query rows that one group stands for
  const bool peaks = options.statistic == TileStatistic::maximum;
  assert(options.tile_q % group_rows == 0 && options.tile_k % stride == 0);
  const QueryTiles geometry(problem, sequence, options.tile_q, options.tile_k);
  const std::int64_t key_tiles = geometry.key_tiles();
  assert(static_cast<std::int64_t>(mass.size()) == tiles * key_tiles);
  std::fill(mass.begin(), mass.end(), 0.0F);

  const std::int64_t first_query = first_tile * options.tile_q;
  const std::int64_t queries = std::min(tiles * options.tile_q, geometry.queries - first_query);
  const std::int64_t groups = ceil_division(queries, group_rows);
  const std::int64_t key_groups = ceil_division(geometry.keys, stride);
  const std::int64_t tile_groups = options.tile_k / stride;
  const std::int64_t panel_tiles = std::max<std::int64_t>(1, kPanelRows / tile_groups);
  const std::int64_t panel_groups = panel_tiles * tile_groups;
  const std::int64_t depth = stride * problem.head_dim;
  const std::int64_t kv_head = q_head / problem.group();

  // Causality is judged for whole groups: a group sees the key groups that begin no later than its last query.
  const auto visible_groups = [&](std::int64_t group) {
    if (!geometry.causal) return key_groups;
    const std::int64_t last = geometry.offset + first_query + group * group_rows + stride - 1;
    return last < 0 ? 0 : std::min(key_groups, last / stride + 1);
  };
  const std::int64_t visible_end = groups == 0 ? 0 : visible_groups(groups - 1);
  const std::int64_t panels = ceil_division(visible_end, panel_groups);
  if (panels == 0) return;

  load_reversed_groups(problem, inputs, sequence, q_head, first_query, queries, stride, options.query_step,
                       buffers.queries);
  buffers.scores.resize(static_cast<std::size_t>(groups * panel_groups));
  buffers.panel_maximum.assign(static_cast<std::size_t>(groups * panels), -std::numeric_limits<float>::infinity());
  buffers.tile_sum.assign(static_cast<std::size_t>(groups * panels * panel_tiles), 0.0F);
  buffers.tile_peak.assign(peaks ? buffers.tile_sum.size() : 0, 0.0F);

  for (std::int64_t panel = 0; panel < panels; ++panel) {
    const std::int64_t begin = panel * panel_groups;
    const std::int64_t count = std::min(panel_groups, visible_end - begin);
    const std::int64_t keys = std::min(count * stride, geometry.keys - begin * stride);
    const float* key_panel =
        key_rows(problem, inputs, sequence, kv_head, begin * stride, keys, count * stride, buffers.keys);
    std::int64_t first_row = 0;  // rows that see nothing of this panel come first
    while (first_row < groups && visible_groups(first_row) <= begin) ++first_row;
    multiply_transposed(buffers.queries.data() + first_row * depth, groups - first_row, depth, key_panel, count, depth,
                        depth, options.scale, buffers.scores.data() + first_row * panel_groups, panel_groups);
    for (std::int64_t g = first_row; g < groups; ++g) {
      const std::int64_t visible = std::min(count, visible_groups(g) - begin);
      float* row = buffers.scores.data() + g * panel_groups;
      const float maximum = row_maximum(row, visible);
      exponentiate(row, visible, maximum);
      buffers.panel_maximum[g * panels + panel] = maximum;
      const std::int64_t first_tile_of_panel = (g * panels + panel) * panel_tiles;
      for (std::int64_t at = 0; at < visible; at += tile_groups) {
        const std::int64_t tile = first_tile_of_panel + at / tile_groups;
        const std::int64_t size = std::min(tile_groups, visible - at);
        buffers.tile_sum[tile] = row_sum(row + at, size);
        if (peaks) buffers.tile_peak[tile] = row_maximum(row + at, size);
      }
    }
  }

  const std::int64_t groups_per_tile = options.tile_q / group_rows;
  for (std::int64_t g = 0; g < groups; ++g) {
    const std::int64_t visible = visible_groups(g);
    if (visible == 0) continue;
    const std::int64_t row_panels = ceil_division(visible, panel_groups);
    const float* maxima = buffers.panel_maximum.data() + g * panels;
    const float* sums = buffers.tile_sum.data() + g * panels * panel_tiles;
    const float maximum = row_maximum(maxima, row_panels);
    float total = 0;
    for (std::int64_t panel = 0; panel < row_panels; ++panel) {
      total += exponential(maxima[panel] - maximum) * row_sum(sums + panel * panel_tiles, panel_tiles);
    }
    float* out = mass.data() + g / groups_per_tile * key_tiles;
    const std::int64_t row_tiles = ceil_division(visible, tile_groups);
    for (std::int64_t panel = 0; panel < row_panels; ++panel) {
      const float factor = exponential(maxima[panel] - maximum) / total;
      const std::int64_t first = panel * panel_tiles;
      const std::int64_t end = std::min(first + panel_tiles, row_tiles);
      const float* tile_peaks = peaks ? buffers.tile_peak.data() + g * panels * panel_tiles : nullptr;
      for (std::int64_t tile = first; tile < end; ++tile) {
        if (peaks) {
          // An undefined row makes its tiles NaN for good.
          const float peak = tile_peaks[tile] * factor;
          out[tile] = out[tile] >= peak ? out[tile] : std::isnan(out[tile]) ? out[tile] : peak;
        } else {
          out[tile] += sums[tile] * factor;
        }
      }
    }
  }
}

}  // namespace tessera::score
