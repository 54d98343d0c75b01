// Attention with 8-bit integers for both products, on whole tiles (SageAttention, arXiv:2410.02367; the probabilities
// and values of PAROAttention, arXiv:2506.16054).
#pragma once

#include "tessera/attention.h"

namespace tessera::kernels {

/// Runs a plan of whole key tiles of source 0 without masks. Queries and keys are bytes with one scale per tile of the
/// plan, keys less their mean over the sequence; probabilities exp(score - maximum so far) are bytes 0 to 127 of a
/// constant scale; values are bytes with one scale per column. Products are exact integers, scores, row sums and
/// outputs float32; the row sum keeps the probabilities before they become bytes. Any query and key orders.
///
/// A query row with NaN or Inf gives NaN, and so do keys and values with them to the query tiles that read their tile;
/// other rows are not touched. Throws Error for plans with masks, gathered keys, parts of tiles, key tiles above 4096
/// or derived sources, and for modifiers.
RunReport run_int8(const Plan& plan, const AttentionInputs& inputs, const AttentionOutputs& outputs,
                   const RunOptions& options);

}  // namespace tessera::kernels
