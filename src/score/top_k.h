// Budget: the k best scores.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "score/score_order.h"

namespace tessera::score {

/// Indices of the k best scores, ascending. Order: score descending, then index ascending. Entries with forced[i] != 0
/// (`forced` may be empty) and NaN scores are kept in any case; `count` says whether they use up k.
std::vector<std::int32_t> top_k(std::span<const float> scores, std::int64_t k,
                                std::span<const std::uint8_t> forced = {}, ForcedCount count = ForcedCount::inside);

}  // namespace tessera::score
