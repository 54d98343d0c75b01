#include "score/cumulative_mass.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace tessera::score {

namespace {

/// The rule over a list that starts with `sum` already taken. `minimum` entries are taken whatever the sums say.
template <class Weight>
std::int64_t take(std::int64_t size, double sum, double target, MassRule rule, std::int64_t minimum,
                  const Weight& weight) {
  std::int64_t taken = 0;
  if (rule == MassRule::topp_incl) {
    while (taken < size && sum < target) sum += weight(taken++);
    return std::max(taken, std::min(minimum, size));
  }
  while (taken < size && sum + weight(taken) <= target) sum += weight(taken++);
  if (rule == MassRule::topp_count) ++taken;
  return std::min(std::max(taken, minimum), size);
}

}  // namespace

std::int64_t count_by_mass(std::span<const float> descending, double target, MassRule rule) {
  return take(static_cast<std::int64_t>(descending.size()), 0, target, rule, 1,
              [&](std::int64_t i) { return static_cast<double>(descending[i]); });
}

std::vector<std::int32_t> select_mass(std::span<const float> scores, double share, MassRule rule,
                                      std::span<const std::uint8_t> forced) {
  std::vector<std::int32_t> kept;
  std::vector<std::int32_t> candidates;
  double forced_mass = 0;
  double total = 0;
  for (std::size_t i = 0; i < scores.size(); ++i) {
    const bool keep = kept_in_any_case(scores, forced, i);
    (keep ? kept : candidates).push_back(static_cast<std::int32_t>(i));
    const double mass = scores[i];
    if (keep) forced_mass += mass;
    total += mass;
  }
  if (share >= 1 || !std::isfinite(total)) {
    kept.resize(scores.size());
    std::iota(kept.begin(), kept.end(), 0);
    return kept;
  }
  std::sort(candidates.begin(), candidates.end(), ScoreOrder{scores});
  const std::int64_t chosen =
      take(static_cast<std::int64_t>(candidates.size()), forced_mass, share * total, rule, kept.empty() ? 1 : 0,
           [&](std::int64_t i) { return static_cast<double>(scores[candidates[i]]); });
  kept.insert(kept.end(), candidates.begin(), candidates.begin() + chosen);
  std::sort(kept.begin(), kept.end());
  return kept;
}

}  // namespace tessera::score
