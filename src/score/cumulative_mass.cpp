#include "score/cumulative_mass.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "score/order_key.h"

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

/// Entries in order, sorted as far as they are asked for: budgets take few of many.
class OrderedEntries {
 public:
  explicit OrderedEntries(std::vector<std::uint64_t> keys) : keys_(std::move(keys)) {}

  std::int32_t operator[](std::int64_t i) {
    while (i >= sorted_) sort_more();
    return index_of_key(keys_[static_cast<std::size_t>(i)]);
  }

 private:
  void sort_more() {
    const std::int64_t end = std::min(sorted_ + step_, std::ssize(keys_));
    if (end < std::ssize(keys_)) std::nth_element(keys_.begin() + sorted_, keys_.begin() + end, keys_.end());
    std::sort(keys_.begin() + sorted_, keys_.begin() + end);
    sorted_ = end;
    step_ *= 2;
  }

  std::vector<std::uint64_t> keys_;
  std::int64_t sorted_ = 0;
  std::int64_t step_ = 32;
};

}  // namespace

std::int64_t count_by_mass(std::span<const float> descending, double target, MassRule rule) {
  return take(static_cast<std::int64_t>(descending.size()), 0, target, rule, 1,
              [&](std::int64_t i) { return static_cast<double>(descending[i]); });
}

std::vector<std::int32_t> select_mass(std::span<const float> scores, double share, MassRule rule,
                                      std::span<const std::uint8_t> forced) {
  std::vector<std::int32_t> kept;
  std::vector<std::uint64_t> candidates;
  candidates.reserve(scores.size());
  double forced_mass = 0;
  double total = 0;
  for (std::size_t i = 0; i < scores.size(); ++i) {
    const auto index = static_cast<std::int32_t>(i);
    const double mass = scores[i];
    if (kept_in_any_case(scores, forced, i)) {
      kept.push_back(index);
      forced_mass += mass;
    } else {
      candidates.push_back(order_key(scores[i], index));
    }
    total += mass;
  }
  if (share >= 1 || !std::isfinite(total)) {
    kept.resize(scores.size());
    std::iota(kept.begin(), kept.end(), 0);
    return kept;
  }
  const std::int64_t size = std::ssize(candidates);
  OrderedEntries entries(std::move(candidates));
  const std::int64_t chosen = take(size, forced_mass, share * total, rule, kept.empty() ? 1 : 0,
                                   [&](std::int64_t i) { return static_cast<double>(scores[entries[i]]); });
  for (std::int64_t i = 0; i < chosen; ++i) kept.push_back(entries[i]);
  std::sort(kept.begin(), kept.end());
  return kept;
}

}  // namespace tessera::score
