#include "methods/int8_run.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "core/error.h"
#include "core/parallel.h"
#include "score/ordered_tiles.h"
#include "score/product.h"
#include "score/token_order.h"

namespace tessera {

namespace {

/// Keys and values of one (block, kv head) as integers, in the order of the plan.
struct QuantisedKeys {
  std::vector<float> keys;          ///< [keys][head_dim]
  std::vector<float> key_scales;    ///< [key tiles]
  std::vector<float> mean;          ///< [head_dim]: taken off the keys
  std::vector<float> values;        ///< [key tiles][value_dim][tile_k], tokens innermost
  std::vector<float> value_scales;  ///< [value_dim]
};

QuantisedKeys quantised_keys(const Problem& problem, const AttentionInputs& inputs, const score::OrderedTiles& tokens,
                             std::int64_t kv_head, std::int64_t tile) {
  const std::int64_t keys = tokens.keys();
  const std::int64_t dim = problem.head_dim;
  const std::int64_t value_dim = problem.value_dim;
  QuantisedKeys result;
  result.keys.resize(static_cast<std::size_t>(keys * dim));
  result.mean.resize(static_cast<std::size_t>(dim), 0.0F);
  tokens.load_keys(problem, inputs, kv_head, 0, keys, result.keys.data());
  for (std::int64_t d = 0; d < dim; ++d) {
    double sum = 0;
    for (std::int64_t j = 0; j < keys; ++j) sum += result.keys[j * dim + d];
    result.mean[d] = static_cast<float>(sum / static_cast<double>(std::max<std::int64_t>(1, keys)));
    for (std::int64_t j = 0; j < keys; ++j) result.keys[j * dim + d] -= result.mean[d];
  }
  for (std::int64_t t = 0; t < tokens.key_tiles(); ++t) {
    result.key_scales.push_back(quantise(std::span(result.keys).subspan(t * tile * dim, tokens.columns(t) * dim)));
  }
  std::vector<float> rows(static_cast<std::size_t>(keys * value_dim));
  tokens.load_values(problem, inputs, kv_head, 0, keys, rows.data());
  result.values.resize(static_cast<std::size_t>(tokens.key_tiles() * value_dim * tile), 0.0F);
  std::vector<float> channel(static_cast<std::size_t>(keys));
  for (std::int64_t d = 0; d < value_dim; ++d) {
    for (std::int64_t j = 0; j < keys; ++j) channel[j] = rows[j * value_dim + d];
    result.value_scales.push_back(quantise(channel));
    for (std::int64_t j = 0; j < keys; ++j) {
      result.values[(j / tile * value_dim + d) * tile + j % tile] = channel[j];
    }
  }
  return result;
}

void check_plan(const Plan& plan, const AttentionInputs& inputs) {
  require(!inputs.modifiers.changes_scores() && inputs.modifiers.sink_logits.empty(),
          "8-bit attention knows no modifiers of scores; expected none");
  for (const PlanEntry& entry : plan.entries) {
    require(entry.source == 0 && entry.mask == EntryMask::none && entry.kind == EntryKind::run &&
                entry.begin % plan.tile_k == 0,
            "8-bit attention runs plans of whole tiles of raw keys without masks");
  }
}

}  // namespace

float quantise(std::span<float> values) {
  float largest = 0;
  for (const float x : values) largest = std::max(largest, std::abs(x));
  const float scale = largest > 0 ? largest / kLevels : 1.0F;
  for (float& x : values) x = std::round(x / scale);
  return scale;
}

RunReport run_int8(const Plan& plan, const AttentionInputs& inputs, const AttentionOutputs& outputs,
                   const RunOptions& options) {
  check_inputs(plan.problem, inputs);
  check_plan(plan, inputs);
  const auto start = std::chrono::steady_clock::now();
  const Problem& problem = plan.problem;
  const std::int64_t dim = problem.head_dim;
  const std::int64_t value_dim = problem.value_dim;
  const std::int64_t tile_k = plan.tile_k;
  parallel_for(problem.batch * problem.q_heads, options.threads, [&](std::int64_t i, int) {
    const std::int64_t s = i / problem.q_heads;
    const std::int64_t head = i % problem.q_heads;
    const std::int64_t block = plan.block_of(s, head);
    std::vector<std::int32_t> order(static_cast<std::size_t>(problem.kv_len_of(s)));
    std::iota(order.begin(), order.end(), 0);
    if (!plan.key_order.empty() && !plan.key_order[block].empty()) order = plan.key_order[block];
    const score::OrderedTiles tokens(problem, s, std::move(order), plan.tile_q, tile_k);
    const bool reordered = !plan.query_order.empty() && !plan.query_order[block].empty();
    require(reordered ? plan.query_order[block] == tokens.query_order() : score::is_identity(tokens.query_order()),
            "8-bit attention runs plans whose queries follow the order of the keys");
    const QuantisedKeys keys = quantised_keys(problem, inputs, tokens, head / problem.group(), tile_k);
    std::vector<float> queries(static_cast<std::size_t>(plan.tile_q * dim));
    std::vector<float> scores(static_cast<std::size_t>(plan.tile_q * tile_k));
    std::vector<float> part(static_cast<std::size_t>(plan.tile_q * value_dim));
    for (std::int64_t tile = 0; tile < tokens.query_tiles(); ++tile) {
      const std::int64_t rows = tokens.rows(tile);
      tokens.load_queries(problem, inputs, head, tile * plan.tile_q, rows, queries.data());
      std::vector<float> mean_scores;  // what the mean of the keys gave every score of a row
      for (std::int64_t r = 0; r < rows; ++r) {
        double dot = 0;
        for (std::int64_t d = 0; d < dim; ++d) dot += static_cast<double>(queries[r * dim + d]) * keys.mean[d];
        mean_scores.push_back(static_cast<float>(dot) * problem.softmax_scale());
      }
      const float query_scale = quantise(std::span(queries).first(rows * dim)) * problem.softmax_scale();
      std::vector<float> most(static_cast<std::size_t>(rows), -std::numeric_limits<float>::infinity());
      std::vector<float> sum(static_cast<std::size_t>(rows), 0.0F);
      std::vector<float> output(static_cast<std::size_t>(rows * value_dim), 0.0F);
      for (const PlanEntry& entry : plan.row(plan.row_begin[block] + tile)) {
        for (std::int64_t first = entry.begin; first < entry.begin + entry.count; first += tile_k) {
          const std::int64_t count = std::min(tile_k, entry.begin + entry.count - first);
          score::multiply_transposed(queries.data(), rows, dim, keys.keys.data() + first * dim, count, dim, dim,
                                     query_scale * keys.key_scales[first / tile_k], scores.data(), count);
          for (std::int64_t r = 0; r < rows; ++r) {
            float* row = scores.data() + r * count;
            const float largest = std::max(most[r], *std::max_element(row, row + count));
            const float factor = std::exp(most[r] - largest);
            most[r] = largest;
            sum[r] *= factor;
            for (std::int64_t d = 0; d < value_dim; ++d) output[r * value_dim + d] *= factor;
            for (std::int64_t j = 0; j < count; ++j) {
              const float probability = std::exp(row[j] - largest);
              sum[r] += probability;
              row[j] = std::round(kLevels * probability);
            }
          }
          score::multiply_transposed(scores.data(), rows, count, keys.values.data() + first * value_dim, value_dim,
                                     tile_k, count, 1 / kLevels, part.data(), value_dim);
          for (std::int64_t at = 0; at < rows * value_dim; ++at) output[at] += part[at];
        }
      }
      for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t query = problem.q_begin_of(s) + tokens.query_order()[tile * plan.tile_q + r];
        std::byte* o = outputs.o.row(problem.tensor_batch_of(s), head, query);
        for (std::int64_t d = 0; d < value_dim; ++d) {
          const float value = sum[r] > 0 ? output[r * value_dim + d] * keys.value_scales[d] / sum[r] : 0.0F;
          store_from_float(o, outputs.o.dtype, d, value);
        }
        if (outputs.lse.empty()) continue;
        outputs.lse[(problem.tensor_batch_of(s) * problem.q_heads + head) * problem.q_len + query] =
            sum[r] > 0 ? most[r] + std::log(sum[r]) + mean_scores[r] : -std::numeric_limits<float>::infinity();
      }
    }
  });
  RunReport report;
  report.kernel = options.kernel;
  report.isa = options.isa.value_or(default_isa());
  report.threads = thread_count(options.threads);
  report.kernel_ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  return report;
}

}  // namespace tessera
