// The offline search of MInference (arXiv:2407.02490): per query head the pattern that loses least at equal cost.
#pragma once

#include <cstdint>
#include <vector>

#include "methods/head_patterns.h"
#include "tessera/attention.h"

namespace tessera::tune {

/// What a pattern is judged by; both come from running it.
enum class PatternForm : std::uint8_t {
  recall,  ///< mean over rows of the softmax mass that it keeps
  output   ///< share of the output elements within `tolerance` of dense attention
};

struct PatternSearch {
  std::vector<HeadPattern> candidates;
  PatternForm form = PatternForm::recall;
  std::int64_t first_row = 2500;  ///< recall counts rows from here on; earlier ones see little that could be dropped
  double tolerance = 5e-3;
  /// Entries that the kernels compute in each head, masked ones included, that every candidate is brought to by
  /// changing its larger size (blocks: their number); 0: candidates stay as they are.
  double pairs = 0;
  std::int64_t block_tiles = 100;  ///< key tiles per query tile of block-sparse candidates
  std::int64_t last_q = 64;
};

struct PatternChoice {
  HeadPattern pattern;
  double score = 0;  ///< in [0, 1], larger is better
  double pairs = 0;  ///< computed entries
};

/// The best candidate of every query head; ties go to the earlier candidate. Throws Error for a problem that is not one
/// causal sequence and for first_row beyond its end.
std::vector<PatternChoice> search_patterns(const Problem& problem, const AttentionInputs& inputs,
                                           const PatternSearch& search, const RunOptions& run = {});

/// Computed entries of an A-shape head over a prompt of that many tokens: what candidates are brought to.
double pairs_of_a_shape(std::int64_t tokens, std::int64_t n_init, std::int64_t n_local);
/// The number of key tiles of 64 per query tile with which block-sparse heads compute about `pairs` entries.
std::int64_t block_tiles_for(std::int64_t tokens, double pairs);

}  // namespace tessera::tune
