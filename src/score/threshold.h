// Budget: every score above a threshold.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "score/score_order.h"

namespace tessera::score {

/// Indices with score > threshold, forced entries and NaN scores, ascending. May be empty.
std::vector<std::int32_t> above_threshold(std::span<const float> scores, float threshold,
                                          std::span<const std::uint8_t> forced = {});

}  // namespace tessera::score
