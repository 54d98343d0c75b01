// One layer of a decoding step through a method, for the tests of decoding methods.
#pragma once

#include <gtest/gtest.h>

#include <vector>

#include "methods/masks.h"

namespace tessera::test {

struct LayerResult {
  std::vector<float> o;  ///< [B, Hq, Nq, Dv]
  Plan plan;

  /// Keys that query 0 of (sequence, head) attends to.
  std::vector<std::int32_t> keys(std::int64_t sequence, std::int64_t head) const {
    const HeadMask mask = head_mask(plan, dense_mask(plan), sequence, head);
    std::vector<std::int32_t> list;
    for (std::int64_t j = 0; j < mask.keys; ++j) {
      if (mask.at(0, j)) list.push_back(static_cast<std::int32_t>(j));
    }
    return list;
  }
};

inline LayerResult attend_layer(const Method& method, const AttentionCase& input, std::int64_t layer,
                                MethodState* state, int threads = 0) {
  const Problem& p = input.problem;
  LayerResult result;
  result.o.resize(static_cast<std::size_t>(p.batch * p.q_heads * p.q_len * p.value_dim));
  const AttentionOutputs outputs{
      mutable_view_of(result.o.data(), DType::f32, {p.batch, p.q_heads, p.q_len, p.value_dim}), {}};
  PlanContext context;
  context.layer = layer;
  context.layers = 1000;
  context.state = state;
  context.run.threads = threads;
  method.attend(p, input.inputs, outputs, context, &result.plan);
  EXPECT_NO_THROW(validate(result.plan));
  return result;
}

inline LayerResult attend_dense(const AttentionCase& input) {
  return attend_layer(*make_method("dense"), input, 0, nullptr);
}

/// One query against `keys` keys, the last of which is its own.
inline CaseShape decoding_shape(std::int64_t keys, std::int64_t q_heads = 4, std::int64_t kv_heads = 2,
                                std::int64_t batch = 1, DType dtype = DType::f32, std::int64_t page_size = 0) {
  return {.name = "decode",
          .batch = batch,
          .q_heads = q_heads,
          .kv_heads = kv_heads,
          .q_len = 1,
          .kv_len = keys,
          .dtype = dtype,
          .page_size = page_size};
}

/// The `budget` keys that a head gives most, the newest always among them.
inline std::vector<std::int32_t> best_keys(const std::vector<double>& probabilities, std::int64_t budget) {
  std::vector<std::int32_t> order;
  for (std::size_t j = 0; j + 1 < probabilities.size(); ++j) order.push_back(static_cast<std::int32_t>(j));
  std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return probabilities[a] > probabilities[b]; });
  order.resize(std::min(order.size(), static_cast<std::size_t>(budget - 1)));
  order.push_back(static_cast<std::int32_t>(probabilities.size()) - 1);
  std::sort(order.begin(), order.end());
  return order;
}

}  // namespace tessera::test
