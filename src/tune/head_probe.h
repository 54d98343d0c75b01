// The head probe of RazorAttention (Efficient KV Cache Compression Through Retrieval Heads, arXiv:2407.15891): which
// heads look back to earlier occurrences of a token, measured on random tokens that repeat.
#pragma once

#include <cstdint>
#include <vector>

#include "tessera/attention.h"

namespace tessera::tune {

/// Mean attention mass of the queries of every repetition but the first, per query head. A token of a later repetition
/// at place o: `echo` is its mass on the tokens at place o of earlier repetitions, `induction` that on the tokens that
/// followed those.
struct RepeatScores {
  std::vector<double> echo;
  std::vector<double> induction;
};

/// `inputs` are of one causal sequence: `first` tokens, then `repeats` times the same `period` tokens. Exact softmax,
/// attention sinks included. Throws Error unless the problem is that and repeats is 2 or more.
RepeatScores score_repeats(const Problem& problem, const AttentionInputs& inputs, std::int64_t first,
                           std::int64_t period, std::int64_t repeats, int threads = 0);

/// Which kv heads retrieve, [layer][kv head]: those with a query head among the `induction_share` of all query heads of
/// all layers with the highest induction scores (one at least), or among the `echo_share` with the highest echo scores
/// (rounded, so perhaps none). Ties go to the earlier head.
std::vector<std::vector<bool>> retrieval_heads(const std::vector<RepeatScores>& layers, std::int64_t kv_heads,
                                               double induction_share, double echo_share);

}  // namespace tessera::tune
