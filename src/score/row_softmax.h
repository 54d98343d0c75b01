// Softmax of one row of scores in place.
#pragma once

#include <limits>
#include <span>

#include "score/exponential.h"

namespace tessera::score {

/// Masked entries are -inf and become 0; a row with nothing but masked entries becomes 0. A NaN or +inf among the
/// scores makes the whole row NaN, which every budget keeps.
inline void softmax_row(std::span<float> row) {
  const auto count = static_cast<std::int64_t>(row.size());
  const float maximum = row_maximum(row.data(), count);
  // The finite shift leaves a row of -inf at 0 and lets a NaN through.
  exponentiate(row.data(), count, maximum == -std::numeric_limits<float>::infinity() ? 0.0F : maximum);
  const float sum = row_sum(row.data(), count);
  if (sum == 0) return;
  const float inverse = 1.0F / sum;
  for (float& x : row) x *= inverse;
}

}  // namespace tessera::score
