// Budget: cumulative mass (top-p). Three rules occur in the literature; they differ by one entry.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "score/score_order.h"

namespace tessera::score {

/// For weights sorted in descending order and an absolute target t.
enum class MassRule : std::uint8_t {
  topp_incl,  ///< smallest prefix whose sum reaches t: the entry that crosses is kept (XAttention, PBS-Attn)
  topp_excl,  ///< longest prefix whose sum stays <= t, but at least one entry (SpargeAttn)
  topp_count  ///< #(cumulative sum <= t) + 1 (FlexPrefill's lines): topp_incl except on an exact tie
};

/// Entries that the rule takes of `descending`, at most all of them; 0 of an empty list. A sum that never reaches the
/// target through rounding takes all.
std::int64_t count_by_mass(std::span<const float> descending, double target, MassRule rule);

/// Indices of the entries that together hold `share` of the total score, ascending. Forced entries and NaN scores are
/// kept and their mass counts first; then entries are added in the order score descending, index ascending. A share of
/// 1 or more, or a total that is not finite, keeps everything.
std::vector<std::int32_t> select_mass(std::span<const float> scores, double share, MassRule rule,
                                      std::span<const std::uint8_t> forced = {});

}  // namespace tessera::score
