// Softmax arithmetic over rows of scores: plain loops that compilers vectorise, with a fixed order of sums.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

namespace tessera::score {

/// As they are compiled for the baseline machine, for short rows and single numbers.
namespace baseline {
#include "score/exponential-inl.h"
}  // namespace baseline

using baseline::exponential;

/// The same for the best instruction set of the machine.
struct RowLevel {
  float (*maximum)(const float* row, std::int64_t count);
  void (*exponentiate)(float* row, std::int64_t count, float shift);
  float (*sum)(const float* row, std::int64_t count);
};
const RowLevel& row_level();

constexpr std::int64_t kShortRow = 32;  ///< not worth a call

/// Largest of count scores, ignoring NaN; -inf when there is none.
inline float row_maximum(const float* row, std::int64_t count) {
  return count < kShortRow ? baseline::row_maximum(row, count) : row_level().maximum(row, count);
}

/// row[i] = exp(row[i] - shift). A NaN score gives NaN, and so does every score when the shift is infinite.
inline void exponentiate(float* row, std::int64_t count, float shift) {
  if (count < kShortRow) {
    baseline::exponentiate(row, count, shift);
  } else {
    row_level().exponentiate(row, count, shift);
  }
}

/// Sum in a fixed order, the same for every build.
inline float row_sum(const float* row, std::int64_t count) {
  return count < kShortRow ? baseline::row_sum(row, count) : row_level().sum(row, count);
}

}  // namespace tessera::score
