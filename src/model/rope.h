// Rotary position embedding: RoFormer, arXiv:2104.09864, with the scalings of RopeConfig.
#pragma once

#include <cstdint>
#include <vector>

#include "tessera/model.h"

namespace tessera::model {

/// Rotates pairs (i, i + dims / 2) of the first `dims` numbers of each head, or neighbours where the model has those,
/// by position * frequency i; without scaling that is theta^(-2i / dims).
class Rope {
 public:
  /// The configuration must have passed validate().
  Rope(const RopeConfig& config, std::int64_t head_dim);

  /// Rotated dimensions of a head.
  std::int64_t dims() const { return dims_; }
  /// Cosines and sines [count][2][dims / 2] of positions [first, first + count) in a sequence of `length` tokens, which
  /// dynamic scaling and longrope depend on. Angles are formed in float64: beyond 100k positions float32 angles would
  /// be wrong in the third digit.
  void tables(std::int64_t first, std::int64_t count, std::int64_t length, std::vector<float>& out) const;
  /// Rotates one token's heads in place: rows [heads][head_dim], `table` its [2][dims / 2].
  void rotate(float* rows, std::int64_t heads, const float* table) const;
  /// The gradient of rotate().
  void rotate_back(float* rows, std::int64_t heads, const float* table) const;
  /// [dims / 2] for a sequence of `length` tokens.
  std::vector<double> frequencies(std::int64_t length) const;

 private:
  template <bool back>
  void turn(float* rows, std::int64_t heads, const float* table) const;

  RopeConfig config_;
  std::int64_t head_dim_;
  std::int64_t dims_;
};

}  // namespace tessera::model
