// Two branches of one softmax, joined by their log-sum-exps.
#pragma once

#include <cstdint>
#include <vector>

#include "tessera/attention.h"

namespace tessera {

/// Output and natural-log LSE of one branch: [batch][heads][rows][value_dim] and [batch][heads][rows] in float.
struct Branch {
  std::vector<float> o;
  std::vector<float> lse;

  Branch(std::int64_t rows, std::int64_t value_dim)
      : o(static_cast<std::size_t>(rows * value_dim)), lse(static_cast<std::size_t>(rows)) {}
};

/// Writes the attention over the keys of both branches to outputs [batch, heads, rows, value_dim]. Rows without a key
/// in either branch yield 0 and -inf.
void merge_branches(const Branch& a, const Branch& b, const AttentionOutputs& outputs, int threads);

/// Joins one more part of a row's softmax, output and LSE, to what is there. Parts without a key have LSE -inf.
void merge_row(float lse, const float* o, std::int64_t value_dim, float& into_lse, float* into_o);

}  // namespace tessera
