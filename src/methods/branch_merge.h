// Two branches of one softmax, joined by their log-sum-exps.
#pragma once

#include <cstdint>
#include <vector>

#include "tessera/attention.h"

namespace tessera {

/// Output and natural-log LSE of one branch: [heads][rows][value_dim] and [heads][rows] in float.
struct Branch {
  std::vector<float> o;
  std::vector<float> lse;

  Branch(std::int64_t rows, std::int64_t value_dim)
      : o(static_cast<std::size_t>(rows * value_dim)), lse(static_cast<std::size_t>(rows)) {}
};

/// Writes the attention over the keys of both branches to outputs [1, heads, rows, value_dim]. At least one branch of
/// each row must have a key.
void merge_branches(const Branch& a, const Branch& b, const AttentionOutputs& outputs, int threads);

}  // namespace tessera
