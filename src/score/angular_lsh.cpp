#include "score/angular_lsh.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <numeric>
#include <random>

#include "score/product.h"

namespace tessera::score {

AngularHash::AngularHash(std::int64_t dim, std::int64_t planes, std::uint64_t seed) : dim_(dim), planes_(planes) {
  // std::normal_distribution differs between libraries; this does not.
  std::mt19937_64 random(seed);
  const auto uniform = [&] { return (static_cast<double>(random() >> 11U) + 0.5) * 0x1p-53; };
  normals_.resize(static_cast<std::size_t>(planes * dim));
  for (float& x : normals_) {
    const double radius = std::sqrt(-2 * std::log(uniform()));
    x = static_cast<float>(radius * std::cos(2 * std::numbers::pi * uniform()));
  }
}

void AngularHash::codes(std::span<const float> rows, std::span<std::int32_t> out) const {
  const auto count = static_cast<std::int64_t>(out.size());
  if (count == 0) return;
  std::vector<float> sides(out.size() * static_cast<std::size_t>(planes_));
  multiply_transposed(rows.data(), count, dim_, normals_.data(), planes_, dim_, dim_, 1.0F, sides.data(), planes_);
  for (std::int64_t i = 0; i < count; ++i) {
    std::int32_t code = 0;
    for (std::int64_t r = 0; r < planes_; ++r) code |= sides[i * planes_ + r] > 0 ? 1 << r : 0;
    out[i] = code;
  }
}

std::vector<std::int32_t> AngularHash::order_of(std::span<const std::int32_t> buckets) {
  std::vector<std::int32_t> order(buckets.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) { return buckets[a] < buckets[b]; });
  return order;
}

}  // namespace tessera::score
