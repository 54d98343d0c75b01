// Ground truth, loss and gradients of learned tile gates.
#include "tessera/gate_training.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "core/error.h"
#include "core/parallel.h"
#include "score/query_tiles.h"
#include "score/tile_gate.h"

namespace tessera {

namespace {

/// d_weight[dim][width] += pooled^T * d_projection.
void add_weight_gradient(const std::vector<float>& pooled, const std::vector<float>& d_projection, std::int64_t dim,
                         std::int64_t width, float* d_weight) {
  const auto tiles = static_cast<std::int64_t>(pooled.size()) / dim;
  for (std::int64_t t = 0; t < tiles; ++t) {
    for (std::int64_t d = 0; d < dim; ++d) {
      const float x = pooled[t * dim + d];
      for (std::int64_t w = 0; w < width; ++w) d_weight[d * width + w] += x * d_projection[t * width + w];
    }
  }
}

/// Loss of one head before the division by the number of entries; d_scores = its derivatives by G.
double head_loss(const score::QueryTiles& tiles, std::int64_t first, const std::vector<float>& scores,
                 const float* target, std::vector<float>& d_scores) {
  const std::int64_t columns = tiles.key_tiles();
  d_scores.assign(scores.size(), 0.0F);
  double loss = 0;
  for (std::int64_t t = first; t < tiles.count(); ++t) {
    const std::int64_t visible = tiles.visible_tiles(t);
    const float* row = scores.data() + t * columns;
    const float* wanted = target + t * columns;
    const double total = std::accumulate(wanted, wanted + visible, 0.0);
    if (total == 0) continue;
    const double most = *std::max_element(row, row + visible);
    double sum = 0;
    for (std::int64_t j = 0; j < visible; ++j) sum += std::exp(row[j] - most);
    const double lse = most + std::log(sum);
    for (std::int64_t j = 0; j < visible; ++j) {
      const double p = std::exp(row[j] - lse);
      if (wanted[j] > 0) loss += wanted[j] * (std::log(wanted[j]) - (row[j] - lse));
      d_scores[t * columns + j] = static_cast<float>(p * total - wanted[j]);
    }
  }
  return loss;
}

}  // namespace

std::vector<float> gate_scores(const Problem& problem, const TileGate& gate, std::int64_t sequence,
                               std::int64_t q_head) {
  problem.validate();
  score::check_gate(problem, gate);
  return score::gate_head(problem, gate, sequence, q_head, score::pooled_queries(problem, gate, sequence, q_head),
                          score::pooled_keys(problem, gate, sequence, q_head / problem.group()))
      .scores;
}

void gate_target(const Problem& problem, const AttentionInputs& inputs, std::int64_t tile, std::span<float> target,
                 const RunOptions& options) {
  check_inputs(problem, inputs);
  require(!problem.variable_length(), "gate_target needs a uniform batch");
  require(tile > 0, "gate_target: tile is {}; expected a positive number", tile);
  const score::QueryTiles tiles(problem, 0, tile, tile);
  const std::array<std::int64_t, 4> shape{problem.batch, problem.q_heads, tiles.count(), tiles.key_tiles()};
  const std::int64_t rows = shape[0] * shape[1] * shape[2];
  require(static_cast<std::int64_t>(target.size()) == rows * shape[3], "target has {} elements; expected [{}]",
          target.size(), fmt::join(shape, ", "));
  if (target.empty()) return;
  std::vector<std::uint16_t> unused(
      static_cast<std::size_t>(problem.batch * problem.q_heads * problem.q_len * problem.value_dim));
  AttentionOutputs outputs{
      mutable_view_of(unused.data(), DType::bf16, {problem.batch, problem.q_heads, problem.q_len, problem.value_dim}),
      {}};
  outputs.tile_maximum = mutable_view_of(target.data(), DType::f32, shape);
  run(dense_plan(problem, tile, tile), inputs, outputs, options);
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::span<float> row =
        target.subspan(static_cast<std::size_t>(r * shape[3]), static_cast<std::size_t>(shape[3]));
    const double sum = std::accumulate(row.begin(), row.end(), 0.0);
    if (sum == 0) continue;
    for (float& x : row) x = static_cast<float>(x / sum);
  }
}

double gate_loss(const Problem& problem, const TileGate& gate, std::span<const float> target,
                 TileGateGradients* gradients, double skipped, int threads) {
  problem.validate();
  score::check_gate(problem, gate);
  require(!problem.variable_length(), "gate_loss needs a uniform batch");
  require(skipped >= 0 && skipped < 1, "gate_loss: skipped is {}; expected a share from 0 to below 1", skipped);
  const score::QueryTiles tiles(problem, 0, gate.tile, gate.tile);
  const std::int64_t columns = tiles.key_tiles();
  const std::int64_t per_head = tiles.count() * columns;
  require(static_cast<std::int64_t>(target.size()) == problem.batch * problem.q_heads * per_head,
          "target has {} elements; expected [{}, {}, {}, {}]", target.size(), problem.batch, problem.q_heads,
          tiles.count(), columns);
  const auto first = static_cast<std::int64_t>(skipped * static_cast<double>(tiles.count()));
  const double entries = static_cast<double>(problem.batch * problem.q_heads * (tiles.count() - first) * columns);
  const bool projected = score::projects_queries(gate);
  const std::int64_t dim = problem.head_dim;
  const std::int64_t width = score::gate_width(gate);
  if (gradients != nullptr) {
    for (std::size_t p = 0; p < kTilePoolings; ++p) {
      const auto clear = [&](const TensorView& weight, std::vector<float>& out) {
        out.assign(weight.data == nullptr ? 0 : static_cast<std::size_t>(weight.heads() * dim * width), 0.0F);
      };
      clear(gate.wq[p], gradients->wq[p]);
      clear(gate.wk[p], gradients->wk[p]);
    }
  }
  if (entries == 0) return 0;

  // A kv head owns the weights of its group, so that sums have a fixed order.
  std::vector<double> losses(static_cast<std::size_t>(problem.kv_heads), 0.0);
  parallel_for(problem.kv_heads, threads, [&](std::int64_t kv_head, int) {
    std::vector<float> d_scores;
    for (std::int64_t b = 0; b < problem.batch; ++b) {
      const score::PooledRows keys = score::pooled_keys(problem, gate, b, kv_head);
      for (std::int64_t head = kv_head * problem.group(); head < (kv_head + 1) * problem.group(); ++head) {
        const score::PooledRows queries = score::pooled_queries(problem, gate, b, head);
        const score::GateHead own = score::gate_head(problem, gate, b, head, queries, keys);
        losses[kv_head] +=
            head_loss(tiles, first, own.scores, target.data() + (b * problem.q_heads + head) * per_head, d_scores);
        if (gradients == nullptr) continue;
        const auto factor = static_cast<float>(1 / (entries * std::sqrt(static_cast<double>(width))));
        std::vector<float> d_queries(own.queries.size(), 0.0F);
        std::vector<float> d_keys(own.keys.size(), 0.0F);
        for (std::int64_t t = first; t < tiles.count(); ++t) {
          for (std::int64_t j = 0; j < tiles.visible_tiles(t); ++j) {
            const float d = d_scores[t * columns + j] * factor;
            for (std::int64_t w = 0; w < width; ++w) {
              d_queries[t * width + w] += d * own.keys[j * width + w];
              d_keys[j * width + w] += d * own.queries[t * width + w];
            }
          }
        }
        score::rotate_tiles(gate, width, tiles.offset, -1, d_queries);
        score::rotate_tiles(gate, width, 0, -1, d_keys);
        const std::int64_t key_weights = projected ? kv_head : head;
        for (std::size_t p = 0; p < kTilePoolings; ++p) {
          if (!gradients->wk[p].empty()) {
            add_weight_gradient(keys[p], d_keys, dim, width, gradients->wk[p].data() + key_weights * dim * width);
          }
          if (!gradients->wq[p].empty()) {
            add_weight_gradient(queries[p], d_queries, dim, width, gradients->wq[p].data() + head * dim * width);
          }
        }
      }
    }
  });
  return std::accumulate(losses.begin(), losses.end(), 0.0) / entries;
}

}  // namespace tessera
