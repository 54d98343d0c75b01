#include "score/top_k.h"

#include <algorithm>

#include "score/order_key.h"

namespace tessera::score {

std::vector<std::int32_t> top_k(std::span<const float> scores, std::int64_t k, std::span<const std::uint8_t> forced,
                                ForcedCount count) {
  std::vector<std::int32_t> kept;
  std::vector<std::uint64_t> candidates;
  candidates.reserve(scores.size());
  for (std::size_t i = 0; i < scores.size(); ++i) {
    const auto index = static_cast<std::int32_t>(i);
    if (kept_in_any_case(scores, forced, i)) {
      kept.push_back(index);
    } else {
      candidates.push_back(order_key(scores[i], index));
    }
  }
  const auto used = count == ForcedCount::inside ? static_cast<std::int64_t>(kept.size()) : 0;
  const std::int64_t chosen = std::clamp<std::int64_t>(k - used, 0, static_cast<std::int64_t>(candidates.size()));
  std::nth_element(candidates.begin(), candidates.begin() + chosen, candidates.end());
  for (std::int64_t i = 0; i < chosen; ++i) kept.push_back(index_of_key(candidates[static_cast<std::size_t>(i)]));
  std::sort(kept.begin(), kept.end());
  return kept;
}

}  // namespace tessera::score
