// Attention with 8-bit integers for both products, held in floats and multiplied one by one: what the kernels on bytes
// must give, up to the rounding of float sums and of exponentials.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "kernels/kernels.h"
#include "kernels/key_rows.h"

namespace tessera::testing {

/// Rounds to 127 levels of one scale (half away from zero) and returns the scale; values become whole numbers.
inline float quantise(float* values, std::size_t count) {
  float largest = 0;
  for (std::size_t i = 0; i < count; ++i) largest = std::max(largest, std::abs(values[i]));
  const float scale = largest > 0 ? largest / 127 : 1.0F;
  for (std::size_t i = 0; i < count; ++i) values[i] = std::round(values[i] / scale);
  return scale;
}

inline std::int64_t whole(float x) {
  return static_cast<std::int64_t>(x);
}

struct Int8Result {
  std::vector<float> o;    ///< [B, Hq, Nq, Dv]
  std::vector<float> lse;  ///< [B, Hq, Nq]
  /// [B, Hq, Nq] the largest change of an output by one level of one probability.
  std::vector<float> level;
};

inline Int8Result int8_reference(const Plan& plan, const AttentionInputs& inputs) {
  const Problem& problem = plan.problem;
  const std::int64_t dim = problem.head_dim;
  const std::int64_t value_dim = problem.value_dim;
  const std::int64_t batch = problem.variable_length() ? 1 : problem.batch;
  const auto all_rows = static_cast<std::size_t>(batch * problem.q_heads * problem.q_len);
  Int8Result result{std::vector<float>(all_rows * static_cast<std::size_t>(value_dim), 0.0F),
                    std::vector<float>(all_rows, -std::numeric_limits<float>::infinity()),
                    std::vector<float>(all_rows, 0.0F)};
  const AttentionOutputs no_outputs{};
  const kernels::Call call{plan, inputs, no_outputs, 1, 0};
  const auto order_of = [](const std::vector<std::vector<std::int32_t>>& orders, std::int64_t block, std::int64_t n) {
    std::vector<std::int32_t> order(static_cast<std::size_t>(n));
    std::iota(order.begin(), order.end(), 0);
    return orders.empty() || orders[block].empty() ? order : orders[block];
  };
  for (std::int64_t s = 0; s < problem.batch; ++s) {
    for (std::int64_t head = 0; head < problem.q_heads; ++head) {
      const std::int64_t block = plan.block_of(s, head);
      const std::int64_t count = problem.kv_len_of(s);
      const auto key_order = order_of(plan.key_order, block, count);
      const auto query_order = order_of(plan.query_order, block, problem.q_len_of(s));
      const auto rows_of = [&](const TensorView& tensor, std::int64_t width) {
        const auto rows = kernels::key_rows_of(problem, tensor, inputs.pages, s, head / problem.group());
        std::vector<float> values;
        for (const std::int32_t key : key_order) {
          for (std::int64_t d = 0; d < width; ++d) values.push_back(load_as_float(rows.row(key), rows.dtype, d));
        }
        return values;
      };
      std::vector<float> k = rows_of(inputs.k, dim);
      std::vector<float> mean;
      for (std::int64_t d = 0; d < dim; ++d) {
        double sum = 0;
        for (std::int64_t j = 0; j < count; ++j) sum += k[j * dim + d];
        mean.push_back(static_cast<float>(sum / static_cast<double>(std::max<std::int64_t>(1, count))));
        for (std::int64_t j = 0; j < count; ++j) k[j * dim + d] -= mean[d];
      }
      std::vector<float> key_scales;
      for (std::int64_t j = 0; j < count; j += plan.tile_k) {
        key_scales.push_back(quantise(k.data() + j * dim, std::min(plan.tile_k, count - j) * dim));
      }
      std::vector<float> v = rows_of(inputs.v, value_dim);
      std::vector<float> value_scales;
      for (std::int64_t d = 0; d < value_dim; ++d) {
        std::vector<float> channel;
        for (std::int64_t j = 0; j < count; ++j) channel.push_back(v[j * value_dim + d]);
        value_scales.push_back(quantise(channel.data(), channel.size()));
        for (std::int64_t j = 0; j < count; ++j) v[j * value_dim + d] = channel[j];
      }
      const auto queries = static_cast<std::int64_t>(query_order.size());
      for (std::int64_t tile = 0; tile * plan.tile_q < queries; ++tile) {
        const std::int64_t rows = std::min(plan.tile_q, queries - tile * plan.tile_q);
        std::vector<float> q;
        std::vector<float> mean_scores;
        for (std::int64_t r = 0; r < rows; ++r) {
          const std::byte* row = call.query_row(inputs.q, s, head, query_order[tile * plan.tile_q + r]);
          double dot = 0;
          for (std::int64_t d = 0; d < dim; ++d) {
            q.push_back(load_as_float(row, inputs.q.dtype, d));
            dot += static_cast<double>(q.back()) * mean[d];
          }
          mean_scores.push_back(static_cast<float>(dot) * problem.softmax_scale());
        }
        const float query_scale = quantise(q.data(), q.size()) * problem.softmax_scale();
        for (std::int64_t r = 0; r < rows; ++r) {
          float most = -std::numeric_limits<float>::infinity();
          float sum = 0;
          std::vector<float> output(static_cast<std::size_t>(value_dim), 0.0F);
          for (const PlanEntry& entry : plan.row(plan.row_begin[block] + tile)) {
            const Plan::KeyRange range = plan.keys_of(entry, block);
            for (std::int64_t first = range.begin; first < range.begin + range.count; first += plan.tile_k) {
              const std::int64_t end = std::min(first + plan.tile_k, range.begin + range.count);
              std::vector<float> scores;
              for (std::int64_t j = first; j < end; ++j) {
                std::int64_t dot = 0;
                for (std::int64_t d = 0; d < dim; ++d) dot += whole(q[r * dim + d]) * whole(k[j * dim + d]);
                scores.push_back(static_cast<float>(dot) * query_scale * key_scales[first / plan.tile_k]);
              }
              const float largest = std::max(most, *std::max_element(scores.begin(), scores.end()));
              const float factor = std::exp(most - largest);
              most = largest;
              sum *= factor;
              std::vector<std::int64_t> total(static_cast<std::size_t>(value_dim), 0);
              for (std::int64_t j = first; j < end; ++j) {
                const float probability = std::exp(scores[j - first] - largest);
                sum += probability;
                const std::int64_t level = std::lround(127 * probability);
                for (std::int64_t d = 0; d < value_dim; ++d) total[d] += level * whole(v[j * value_dim + d]);
              }
              for (std::int64_t d = 0; d < value_dim; ++d) {
                output[d] = output[d] * factor + static_cast<float>(total[d]) / 127;
              }
            }
          }
          const auto index = static_cast<std::size_t>(call.lse_index(s, head, query_order[tile * plan.tile_q + r]));
          if (sum <= 0) continue;
          for (std::int64_t d = 0; d < value_dim; ++d) {
            result.o[index * value_dim + d] = output[d] * value_scales[d] / sum;
            result.level[index] = std::max(result.level[index], value_scales[d] / sum);
          }
          result.lse[index] = most + std::log(sum) + mean_scores[r];
        }
      }
    }
  }
  return result;
}

}  // namespace tessera::testing
