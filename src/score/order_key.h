// The order of scores (score_order.h) as numbers.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace tessera::score {

/// Ascending order of these is ScoreOrder: sorts without a look at the scores.
inline std::uint64_t order_key(float score, std::int32_t index) {
  const auto bits = std::bit_cast<std::uint32_t>(score == 0 ? 0.0F : score);
  const std::uint32_t rising = (bits >> 31U) != 0 ? ~bits : bits | 0x80000000U;
  const std::uint32_t falling = std::isnan(score) ? 0U : ~rising;
  return (static_cast<std::uint64_t>(falling) << 32U) | static_cast<std::uint32_t>(index);
}
inline std::int32_t index_of_key(std::uint64_t key) {
  return static_cast<std::int32_t>(key & 0xffffffffU);
}

}  // namespace tessera::score
