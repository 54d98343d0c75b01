// The one order of scores: NaN first (an undefined score is kept, the safe side), then descending, ties by index.
#pragma once

#include <cmath>
#include <cstdint>
#include <span>

namespace tessera::score {

struct ScoreOrder {
  std::span<const float> scores;

  bool operator()(std::int32_t a, std::int32_t b) const {
    const float x = scores[a];
    const float y = scores[b];
    if (std::isnan(x) || std::isnan(y)) return std::isnan(x) == std::isnan(y) ? a < b : std::isnan(x);
    return x != y ? x > y : a < b;
  }
};

/// Whether entries that are kept in any case use up a budget or come on top of it.
enum class ForcedCount : std::uint8_t { inside, outside };

/// True where candidate i is kept before any budget is asked: forced by the method, or its score is NaN.
inline bool kept_in_any_case(std::span<const float> scores, std::span<const std::uint8_t> forced, std::size_t i) {
  return std::isnan(scores[i]) || (!forced.empty() && forced[i] != 0);
}

}  // namespace tessera::score
