// Exact attention of a few rows in float64: references at lengths where all rows would take too long.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "tessera/attention.h"

namespace tessera::eval {

/// Dense attention of chosen query rows of every (batch, query head).
struct SampledRows {
  std::vector<std::int64_t> rows;  ///< query indices, as given
  std::int64_t heads = 0;          ///< batch * q_heads
  std::int64_t value_dim = 0;
  std::vector<double> o;    ///< [heads, rows, value_dim]
  std::vector<double> lse;  ///< [heads, rows], natural log

  /// The same rows of an output [B, Hq, Nq, Dv] and of its lse [B, Hq, Nq], as float, for compare_outputs().
  std::vector<float> rows_of(const TensorView& output) const;
  std::vector<float> rows_of(std::span<const float> output_lse, std::int64_t q_len) const;
  std::vector<float> o_as_float() const { return {o.begin(), o.end()}; }
  std::vector<float> lse_as_float() const { return {lse.begin(), lse.end()}; }
};

/// Exact rows, cost N * (D + Dv) each, all modifiers included. Throws Error for a row out of range, paged inputs,
/// derived sources and variable-length batches.
SampledRows sampled_reference(const Problem& problem, const AttentionInputs& inputs, std::span<const std::int64_t> rows,
                              int threads = 0);

/// `count` rows spread evenly over [0, q_len), the last one included.
std::vector<std::int64_t> spread_rows(std::int64_t q_len, std::int64_t count);

}  // namespace tessera::eval
