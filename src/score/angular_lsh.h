// Locality-sensitive hashing by angles: vectors that point alike share a bucket, and neighbouring buckets hold vectors
// that are separated by one plane only (HyperAttention, arXiv 2310.05869).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace tessera::score {

class AngularHash {
 public:
  /// `planes` random planes (1 to 16) through the origin of `dim` dimensions; the same for equal seeds, on every
  /// machine.
  AngularHash(std::int64_t dim, std::int64_t planes, std::uint64_t seed);

  /// Sides of the planes that the rows [n][dim] lie on: bit r is set on the positive side of plane r.
  void codes(std::span<const float> rows, std::span<std::int32_t> out) const;
  /// Places [n] of 0 to n - 1 sorted by bucket, equal buckets in their order.
  static std::vector<std::int32_t> order_of(std::span<const std::int32_t> buckets);

 private:
  std::int64_t dim_;
  std::int64_t planes_;
  std::vector<float> normals_;  ///< [planes][dim]
};

/// The reflected Gray code of i: codes of successive numbers differ in one bit.
constexpr std::int32_t gray_code(std::int32_t i) {
  return i ^ (i >> 1);
}
/// Place of a code in the sequence of Gray codes: the inverse of gray_code.
constexpr std::int32_t gray_rank(std::int32_t code) {
  std::int32_t rank = code;
  for (std::int32_t rest = code >> 1; rest != 0; rest >>= 1) rank ^= rest;
  return rank;
}

}  // namespace tessera::score
