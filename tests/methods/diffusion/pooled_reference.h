// Attention over raw and pooled keys written out in float64, from nothing but the plan's entries and the tensors.
#pragma once

#include <cmath>
#include <functional>
#include <limits>
#include <span>
#include <vector>

#include "methods/masks.h"

namespace tessera::test {

/// Output and LSE of one call, owned.
struct Result {
  std::vector<float> o;
  std::vector<float> lse;
  Plan plan;
};

inline Result attend(const Method& method, const AttentionCase& input, KernelKind kernel = KernelKind::automatic,
                     int threads = 2) {
  const Problem& problem = input.problem;
  const std::int64_t batch = problem.variable_length() ? 1 : problem.batch;
  Result result;
  result.o.resize(static_cast<std::size_t>(batch * problem.q_heads * problem.q_len * problem.value_dim));
  result.lse.resize(static_cast<std::size_t>(batch * problem.q_heads * problem.q_len));
  PlanContext context;
  context.run.kernel = kernel;
  context.run.threads = threads;
  const AttentionOutputs outputs{
      mutable_view_of(result.o.data(), DType::f32, {batch, problem.q_heads, problem.q_len, problem.value_dim}),
      result.lse};
  method.attend(problem, input.inputs, outputs, context, &result.plan);
  validate(result.plan);
  return result;
}

/// Row of the output that query n of (sequence, head) has in a Result.
inline std::int64_t output_row(const Problem& problem, std::int64_t s, std::int64_t h, std::int64_t n) {
  return (problem.tensor_batch_of(s) * problem.q_heads + h) * problem.q_len + problem.q_begin_of(s) + n;
}

/// One key of an exact computation: its members (original indices of raw keys).
struct PooledKey {
  std::int64_t source = 0;
  std::vector<std::int64_t> members;
};

/// The keys that each row of the plan names, in entries of `members_of[source]` raw keys.
inline std::vector<PooledKey> keys_of_row(const Plan& plan, std::int64_t s, std::int64_t h, std::int64_t tile,
                                          std::span<const std::int64_t> members_of) {
  const std::int64_t block = plan.block_of(s, h);
  const std::int64_t keys = plan.problem.kv_len_of(s);
  const bool ordered = !plan.key_order.empty() && !plan.key_order[block].empty();
  std::vector<PooledKey> row;
  for (const PlanEntry& entry : plan.row(plan.row_begin[block] + tile)) {
    const Plan::KeyRange range = plan.keys_of(entry, block);
    const std::int64_t members = members_of[entry.source];
    for (std::int64_t i = 0; i < range.count; ++i) {
      const std::int64_t place =
          entry.kind == EntryKind::gather ? std::int64_t{plan.tokens[range.begin + i]} : range.begin + i;
      PooledKey key{entry.source, {}};
      for (std::int64_t m = place * members; m < std::min((place + 1) * members, keys); ++m) {
        key.members.push_back(ordered ? plan.key_order[block][m] : m);
      }
      row.push_back(std::move(key));
    }
  }
  return row;
}

/// Mean of K or V over members.
inline std::vector<double> mean_of(const AttentionCase& input, std::int64_t s, std::int64_t kv_head,
                                   std::span<const std::int64_t> members, bool values) {
  const TensorView& tensor = values ? input.inputs.v : input.inputs.k;
  std::vector<double> mean(static_cast<std::size_t>(tensor.dim()));
  for (const std::int64_t j : members) {
    const std::byte* row = nullptr;
    if (input.inputs.pages.used()) {
      const PageTable& pages = input.inputs.pages;
      row = tensor.row(pages.table[s * pages.pages_per_sequence + j / pages.page_size], kv_head, j % pages.page_size);
    } else {
      row = tensor.row(input.problem.tensor_batch_of(s), kv_head, input.problem.kv_begin_of(s) + j);
    }
    for (std::size_t d = 0; d < mean.size(); ++d) {
      mean[d] += load_as_float(row, tensor.dtype, static_cast<std::int64_t>(d)) / static_cast<double>(members.size());
    }
  }
  return mean;
}

/// scale * q . mean key.
inline double score_of(const AttentionCase& input, std::int64_t s, std::int64_t h, std::int64_t n,
                       std::span<const double> key) {
  double dot = 0;
  for (std::size_t d = 0; d < key.size(); ++d) dot += key[d] * input.q(s, h, n, static_cast<std::int64_t>(d));
  return dot * static_cast<double>(input.problem.softmax_scale());
}

}  // namespace tessera::test
