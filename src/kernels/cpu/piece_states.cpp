#include "kernels/cpu/piece_states.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>

namespace tessera::kernels {

namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

}  // namespace

PieceStates::PieceStates(std::int64_t pieces, std::int64_t rows, std::int64_t columns)
    : rows_(rows),
      columns_(columns),
      maximum_(static_cast<std::size_t>(pieces * rows), kMinusInfinity),
      sum_(maximum_.size()),
      output_(maximum_.size() * static_cast<std::size_t>(columns)) {}

void PieceStates::merge(std::int64_t first, std::int64_t last, std::int64_t value_dim, float* o, float* lse) const {
  for (std::int64_t row = 0; row < rows_; ++row) {
    float* joined = o + row * value_dim;
    std::fill_n(joined, value_dim, 0.0F);
    lse[row] = kMinusInfinity;
    if (first == last) continue;
    const auto state_of = [&](std::int64_t piece) { return static_cast<std::size_t>(piece * rows_ + row); };
    float highest = kMinusInfinity;
    for (std::int64_t piece = first; piece < last; ++piece) highest = std::max(highest, maximum_[state_of(piece)]);
    float total = 0;
    for (std::int64_t piece = first; piece < last; ++piece) {
      const std::size_t state = state_of(piece);
      const float factor = maximum_[state] == highest ? 1.0F : std::exp2(maximum_[state] - highest);
      total += sum_[state] * factor;
      const float* part = output_.data() + state * static_cast<std::size_t>(columns_);
      for (std::int64_t d = 0; d < value_dim; ++d) joined[d] += part[d] * factor;
    }
    lse[row] = (highest + std::log2(total)) * std::numbers::ln2_v<float>;
    for (std::int64_t d = 0; d < value_dim; ++d) joined[d] /= total;
  }
}

std::vector<float> scaled_queries(const float* queries, std::int64_t rows, std::int64_t head_dim, std::int64_t stride,
                                  float scale) {
  std::vector<float> scaled(static_cast<std::size_t>(rows * stride));
  const float factor = scale * std::numbers::log2e_v<float>;
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t d = 0; d < head_dim; ++d) {
      scaled[static_cast<std::size_t>(row * stride + d)] = queries[row * head_dim + d] * factor;
    }
  }
  return scaled;
}

}  // namespace tessera::kernels
