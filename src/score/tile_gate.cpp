#include "score/tile_gate.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string_view>

#include "core/convert.h"
#include "core/error.h"
#include "score/product.h"
#include "score/query_tiles.h"

namespace tessera::score {

namespace {

constexpr std::array<std::string_view, kTilePoolings> kPoolingNames{"max", "min", "avg"};

bool used(const TensorView& weights) {
  return weights.data != nullptr;
}

std::int64_t any_width(const std::array<TensorView, kTilePoolings>& weights) {
  for (const TensorView& weight : weights) {
    if (used(weight)) return weight.dim();
  }
  return 0;
}

void check_rows(const TensorView& rows, std::string_view name, const std::array<std::int64_t, 4>& expected) {
  require(rows.data != nullptr, "gate: {} is missing; expected [{}]", name, fmt::join(expected, ", "));
  require(is_attention_dtype(rows.dtype) && rows.shape == expected && rows.strides[3] == 1,
          "gate: {} is {} [{}]; expected f32, bf16 or f16 [{}] with stride 1 on its last axis", name,
          name_of(rows.dtype), fmt::join(rows.shape, ", "), fmt::join(expected, ", "));
}

/// Pools a tile at a time; which[p] says which poolings are wanted.
template <class Wanted>
PooledRows pool(const Problem& problem, const TensorView& view, std::int64_t batch, std::int64_t head,
                std::int64_t begin, std::int64_t rows, std::int64_t tile, const Wanted& wanted) {
  const std::int64_t dim = problem.head_dim;
  const std::int64_t tiles = (rows + tile - 1) / tile;
  PooledRows pooled;
  for (std::size_t p = 0; p < kTilePoolings; ++p) {
    if (wanted(p)) pooled[p].resize(static_cast<std::size_t>(tiles * dim));
  }
  std::vector<float> row(static_cast<std::size_t>(dim));
  std::vector<float> most(row.size());
  std::vector<float> least(row.size());
  std::vector<float> sum(row.size());
  for (std::int64_t t = 0; t < tiles; ++t) {
    const std::int64_t end = std::min((t + 1) * tile, rows);
    for (std::int64_t n = t * tile; n < end; ++n) {
      to_float(view.row(batch, head, begin + n), view.dtype, dim, row.data());
      if (n == t * tile) {
        most = least = sum = row;
        continue;
      }
      for (std::int64_t d = 0; d < dim; ++d) {
        // Written so that NaN stays.
        most[d] = row[d] <= most[d] ? most[d] : std::isnan(most[d]) ? most[d] : row[d];
        least[d] = row[d] >= least[d] ? least[d] : std::isnan(least[d]) ? least[d] : row[d];
        sum[d] += row[d];
      }
    }
    for (float& x : sum) x /= static_cast<float>(end - t * tile);
    const std::array<const std::vector<float>*, kTilePoolings> results{&most, &least, &sum};
    for (std::size_t p = 0; p < kTilePoolings; ++p) {
      if (wanted(p)) std::copy(results[p]->begin(), results[p]->end(), pooled[p].begin() + t * dim);
    }
  }
  return pooled;
}

/// [tiles][width] = sum over the poolings of pooled * weight of the head.
std::vector<float> project(const PooledRows& pooled, const std::array<TensorView, kTilePoolings>& weights,
                           std::int64_t head, std::int64_t tiles, std::int64_t dim, std::int64_t width) {
  std::vector<float> out(static_cast<std::size_t>(tiles * width), 0.0F);
  std::vector<float> part(out.size());
  std::vector<float> row(static_cast<std::size_t>(width));
  std::vector<float> turned(static_cast<std::size_t>(width * dim));
  for (std::size_t p = 0; p < kTilePoolings; ++p) {
    if (!used(weights[p]) || tiles == 0) continue;
    for (std::int64_t d = 0; d < dim; ++d) {
      to_float(weights[p].row(0, head, d), weights[p].dtype, width, row.data());
      for (std::int64_t w = 0; w < width; ++w) turned[w * dim + d] = row[w];
    }
    multiply_transposed(pooled[p].data(), tiles, dim, turned.data(), width, dim, dim, 1, part.data(), width);
    for (std::size_t i = 0; i < out.size(); ++i) out[i] += part[i];
  }
  return out;
}

}  // namespace

bool projects_queries(const TileGate& gate) {
  return any_width(gate.wq) != 0;
}

std::int64_t gate_width(const TileGate& gate) {
  return any_width(gate.wk);
}

void check_gate(const Problem& problem, const TileGate& gate) {
  const std::int64_t batch = problem.variable_length() ? 1 : problem.batch;
  check_rows(gate.q, "q before RoPE", {batch, problem.q_heads, problem.q_len, problem.head_dim});
  check_rows(gate.k, "k before RoPE", {batch, problem.kv_heads, problem.kv_len, problem.head_dim});
  require(gate.tile > 0, "gate: tile is {}; expected a positive number", gate.tile);
  require(gate.rope_base > 1 && std::isfinite(gate.rope_base), "gate: rope_base is {}; expected a number above 1",
          gate.rope_base);
  const std::int64_t width = gate_width(gate);
  const std::int64_t key_heads = projects_queries(gate) ? problem.kv_heads : problem.q_heads;
  require(width > 0, "gate: no key weights; expected [1, {}, {}, width] for at least one of max, min and avg",
          key_heads, problem.head_dim);
  require(width % 2 == 0, "gate: width is {}; expected an even number, for its rotation", width);
  require(projects_queries(gate) || width == problem.head_dim,
          "gate: width is {}; without query weights it has to be the head dimension {}", width, problem.head_dim);
  for (std::size_t p = 0; p < kTilePoolings; ++p) {
    const std::string key_name = fmt::format("key weight '{}'", kPoolingNames.at(p));
    const std::string query_name = fmt::format("query weight '{}'", kPoolingNames.at(p));
    if (used(gate.wk[p])) check_rows(gate.wk[p], key_name, {1, key_heads, problem.head_dim, width});
    if (used(gate.wq[p])) check_rows(gate.wq[p], query_name, {1, problem.q_heads, problem.head_dim, width});
  }
}

PooledRows pooled_queries(const Problem& problem, const TileGate& gate, std::int64_t sequence, std::int64_t q_head) {
  const bool projected = projects_queries(gate);
  return pool(problem, gate.q, problem.tensor_batch_of(sequence), q_head, problem.q_begin_of(sequence),
              problem.q_len_of(sequence), gate.tile, [&](std::size_t p) {
                return projected ? used(gate.wq[p]) : p == static_cast<std::size_t>(gate.query_pooling);
              });
}

PooledRows pooled_keys(const Problem& problem, const TileGate& gate, std::int64_t sequence, std::int64_t kv_head) {
  return pool(problem, gate.k, problem.tensor_batch_of(sequence), kv_head, problem.kv_begin_of(sequence),
              problem.kv_len_of(sequence), gate.tile, [&](std::size_t p) { return used(gate.wk[p]); });
}

void rotate_tiles(const TileGate& gate, std::int64_t width, std::int64_t first, int direction,
                  std::vector<float>& rows) {
  const std::int64_t half = width / 2;
  const auto tiles = static_cast<std::int64_t>(rows.size()) / width;
  for (std::int64_t i = 0; i < half; ++i) {
    const double frequency = std::pow(gate.rope_base, -2.0 * static_cast<double>(i) / static_cast<double>(width));
    for (std::int64_t t = 0; t < tiles; ++t) {
      const double angle = static_cast<double>(first + t * gate.tile) * frequency;
      const auto cosine = static_cast<float>(std::cos(angle));
      const auto sine = static_cast<float>(direction * std::sin(angle));
      float& a = rows[t * width + i];
      float& b = rows[t * width + i + half];
      const float turned = a * cosine - b * sine;
      b = b * cosine + a * sine;
      a = turned;
    }
  }
}

GateHead gate_head(const Problem& problem, const TileGate& gate, std::int64_t sequence, std::int64_t q_head,
                   const PooledRows& queries, const PooledRows& keys) {
  const QueryTiles tiles(problem, sequence, gate.tile, gate.tile);
  const std::int64_t width = gate_width(gate);
  const bool projected = projects_queries(gate);
  GateHead head;
  head.queries = projected ? project(queries, gate.wq, q_head, tiles.count(), problem.head_dim, width)
                           : queries.at(static_cast<std::size_t>(gate.query_pooling));
  head.keys =
      project(keys, gate.wk, projected ? q_head / problem.group() : q_head, tiles.key_tiles(), problem.head_dim, width);
  rotate_tiles(gate, width, tiles.offset, 1, head.queries);
  rotate_tiles(gate, width, 0, 1, head.keys);
  head.scores.resize(static_cast<std::size_t>(tiles.count() * tiles.key_tiles()));
  if (head.scores.empty()) return head;
  multiply_transposed(head.queries.data(), tiles.count(), width, head.keys.data(), tiles.key_tiles(), width, width,
                      1 / std::sqrt(static_cast<float>(width)), head.scores.data(), tiles.key_tiles());
  for (std::int64_t t = 0; t < tiles.count(); ++t) {
    float* row = head.scores.data() + t * tiles.key_tiles();
    std::fill(row + tiles.visible_tiles(t), row + tiles.key_tiles(), -std::numeric_limits<float>::infinity());
  }
  return head;
}

}  // namespace tessera::score
