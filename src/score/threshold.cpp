#include "score/threshold.h"

namespace tessera::score {

std::vector<std::int32_t> above_threshold(std::span<const float> scores, float threshold,
                                          std::span<const std::uint8_t> forced) {
  std::vector<std::int32_t> kept;
  for (std::size_t i = 0; i < scores.size(); ++i) {
    if (scores[i] > threshold || kept_in_any_case(scores, forced, i)) kept.push_back(static_cast<std::int32_t>(i));
  }
  return kept;
}

}  // namespace tessera::score
