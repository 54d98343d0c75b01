// Attention with 8-bit integers for both products, on whole tiles (SageAttention, arXiv:2410.02367; the probabilities
// and values of PAROAttention, arXiv:2506.16054).
#pragma once

#include <cstdint>
#include <span>

#include "tessera/attention.h"

namespace tessera {

/// Largest 8-bit level, and the scale of unnormalised probabilities: exact for the maximum of a row.
inline constexpr float kLevels = 127;

/// Rounds to levels of one scale (half away from zero) and returns the scale; values become whole numbers.
float quantise(std::span<float> values);

/// Runs a plan of unmasked runs of raw keys: queries and keys as integers per tile of the plan (keys less their mean),
/// probabilities as integers 0 to 127 of a constant scale, values per channel; the row sum keeps float probabilities.
/// The integers are held in floats, whose products are exact here: the results are those of integer units, the speed is
/// not. Throws Error for plans with masks, derived sources or queries in another order than the
/// keys, and for modifiers.
RunReport run_int8(const Plan& plan, const AttentionInputs& inputs, const AttentionOutputs& outputs,
                   const RunOptions& options);

}  // namespace tessera
