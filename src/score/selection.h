// Keys chosen once and used again: by later layers of the same step, or by later steps.
#pragma once

#include <cstdint>
#include <vector>

#include "tessera/plan.h"

namespace tessera::score {

/// Lists of tokens or pages per (sequence, head).
struct Selection {
  std::int64_t page = 1;                         ///< tokens per listed index; 1: the lists name tokens
  std::int64_t heads = 1;                        ///< lists per sequence: 1, kv_heads or q_heads
  std::int64_t kv_len = 0;                       ///< keys it was made for
  std::vector<std::vector<std::int32_t>> lists;  ///< [batch * heads], ascending
};

/// The plan that computes the listed keys for every query, without a mask: for steps whose queries may see them all.
/// Pages that lie next to each other become one run; the last page may be ragged.
Plan plan_of(const Problem& problem, const Selection& selection);

}  // namespace tessera::score
