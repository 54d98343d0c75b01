#include "eval/sampled.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/convert.h"
#include "core/error.h"
#include "core/parallel.h"

namespace tessera::eval {
namespace {

/// One exact row into out_o [value_dim] and out_lse.
void attend_row(const Problem& problem, const AttentionInputs& inputs, std::int64_t batch, std::int64_t head,
                std::int64_t row, std::span<double> out_o, double& out_lse) {
  const std::int64_t dim = problem.head_dim;
  const std::int64_t kv_head = head / problem.group();
  const std::int64_t position = problem.q_offset_of(batch) + row;
  const std::int64_t end = problem.causal ? std::clamp<std::int64_t>(position + 1, 0, problem.kv_len) : problem.kv_len;
  const Modifiers& modifiers = inputs.modifiers;
  std::vector<float> q(dim);
  std::vector<float> other(std::max(dim, problem.value_dim));
  to_float(inputs.q.row(batch, head, row), inputs.q.dtype, dim, q.data());
  std::vector<double> scores(end);
  double top = -std::numeric_limits<double>::infinity();
  for (std::int64_t j = 0; j < end; ++j) {
    to_float(inputs.k.row(batch, kv_head, j), inputs.k.dtype, dim, other.data());
    double dot = 0;
    for (std::int64_t c = 0; c < dim; ++c) dot += static_cast<double>(q[c]) * other[c];
    double score = dot * problem.softmax_scale();
    if (modifiers.softcap != 0) score = modifiers.softcap * std::tanh(score / modifiers.softcap);
    if (!modifiers.alibi_slopes.empty()) score += modifiers.alibi_slopes[head] * static_cast<double>(j - position);
    if (const TensorView& bias = modifiers.key_bias; bias.data != nullptr) {
      const std::int64_t bias_head = head * bias.heads() / problem.q_heads;
      score += load_as_float(bias.row(bias.batch() == 1 ? 0 : batch, bias_head, j), bias.dtype, 0);
    }
    scores[j] = score;
    top = std::max(top, score);
  }
  std::fill(out_o.begin(), out_o.end(), 0.0);
  out_lse = -std::numeric_limits<double>::infinity();
  if (!modifiers.sink_logits.empty()) top = std::max<double>(top, modifiers.sink_logits[head]);
  if (std::isinf(top) && top < 0) return;
  double sum = modifiers.sink_logits.empty() ? 0 : std::exp(modifiers.sink_logits[head] - top);
  for (std::int64_t j = 0; j < end; ++j) {
    const double weight = std::exp(scores[j] - top);
    sum += weight;
    to_float(inputs.v.row(batch, kv_head, j), inputs.v.dtype, problem.value_dim, other.data());
    for (std::int64_t c = 0; c < problem.value_dim; ++c) out_o[c] += weight * other[c];
  }
  for (double& value : out_o) value /= sum;
  out_lse = top + std::log(sum);
}

}  // namespace

SampledRows sampled_reference(const Problem& problem, const AttentionInputs& inputs, std::span<const std::int64_t> rows,
                              int threads) {
  require(!problem.variable_length(), "problem has cu_seqlens; sampled rows need a uniform batch");
  require(!inputs.pages.used() && inputs.sources.empty(),
          "inputs have pages or derived sources; sampled rows need plain keys and values");
  check_inputs(problem, inputs);
  for (const std::int64_t row : rows) {
    require(row >= 0 && row < problem.q_len, "row is {}; expected 0 to {}", row, problem.q_len - 1);
  }
  SampledRows sampled{.rows = {rows.begin(), rows.end()},
                      .heads = problem.batch * problem.q_heads,
                      .value_dim = problem.value_dim,
                      .o = {},
                      .lse = {}};
  const auto count = static_cast<std::int64_t>(rows.size());
  sampled.o.resize(sampled.heads * count * problem.value_dim);
  sampled.lse.resize(sampled.heads * count);
  parallel_for(sampled.heads * count, threads, [&](std::int64_t item, int) {
    const std::int64_t head = item / count;
    const std::span<double> o(sampled.o.data() + item * problem.value_dim, problem.value_dim);
    attend_row(problem, inputs, head / problem.q_heads, head % problem.q_heads, rows[item % count], o,
               sampled.lse[item]);
  });
  return sampled;
}

std::vector<float> SampledRows::rows_of(const TensorView& output) const {
  std::vector<float> chosen;
  for (std::int64_t head = 0; head < heads; ++head) {
    for (const std::int64_t row : rows) {
      const std::byte* at = output.row(head / output.heads(), head % output.heads(), row);
      for (std::int64_t c = 0; c < value_dim; ++c) chosen.push_back(load_as_float(at, output.dtype, c));
    }
  }
  return chosen;
}

std::vector<float> SampledRows::rows_of(std::span<const float> output_lse, std::int64_t q_len) const {
  std::vector<float> chosen;
  for (std::int64_t head = 0; head < heads; ++head) {
    for (const std::int64_t row : rows) chosen.push_back(output_lse[head * q_len + row]);
  }
  return chosen;
}

std::vector<std::int64_t> spread_rows(std::int64_t q_len, std::int64_t count) {
  std::vector<std::int64_t> rows;
  const std::int64_t wanted = std::min(count, q_len);
  for (std::int64_t r = 1; r <= wanted; ++r) rows.push_back(r * q_len / wanted - 1);
  return rows;
}

}  // namespace tessera::eval
