#include "score/top_k.h"

#include <algorithm>

namespace tessera::score {

std::vector<std::int32_t> top_k(std::span<const float> scores, std::int64_t k, std::span<const std::uint8_t> forced,
                                ForcedCount count) {
  std::vector<std::int32_t> kept;
  std::vector<std::int32_t> candidates;
  for (std::size_t i = 0; i < scores.size(); ++i) {
    (kept_in_any_case(scores, forced, i) ? kept : candidates).push_back(static_cast<std::int32_t>(i));
  }
  const auto used = count == ForcedCount::inside ? static_cast<std::int64_t>(kept.size()) : 0;
  const std::int64_t chosen = std::clamp<std::int64_t>(k - used, 0, static_cast<std::int64_t>(candidates.size()));
  std::nth_element(candidates.begin(), candidates.begin() + chosen, candidates.end(), ScoreOrder{scores});
  kept.insert(kept.end(), candidates.begin(), candidates.begin() + chosen);
  std::sort(kept.begin(), kept.end());
  return kept;
}

}  // namespace tessera::score
