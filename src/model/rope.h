// Rotary position embedding: RoFormer, arXiv:2104.09864, in the half-rotation layout of Hugging Face.
#pragma once

#include <cstdint>
#include <vector>

namespace tessera::model {

/// Rotates pairs (i, i + head_dim / 2) of each head by position * theta^(-2i / head_dim).
class Rope {
 public:
  /// head_dim must be even.
  Rope(std::int64_t head_dim, double theta);

  /// Cosines and sines [count][2][head_dim / 2] of positions [first, first + count). Angles are formed in float64:
  /// beyond 100k positions float32 angles would be wrong in the third digit.
  void tables(std::int64_t first, std::int64_t count, std::vector<float>& out) const;
  /// Rotates one token's heads in place: rows [heads][head_dim], `table` its [2][head_dim / 2].
  void rotate(float* rows, std::int64_t heads, const float* table) const;
  /// The inverse, which is also the gradient of rotate().
  void rotate_back(float* rows, std::int64_t heads, const float* table) const;

 private:
  std::vector<double> frequencies_;  ///< [head_dim / 2]
};

}  // namespace tessera::model
