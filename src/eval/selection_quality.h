// How good a selection is: the exact softmax mass of what a plan computes, beside what the best plan of its size would
// have, on sampled query blocks.
#pragma once

#include <cstdint>

#include "tessera/attention.h"
#include "tessera/plan.h"

namespace tessera::eval {

struct QualityOptions {
  std::int64_t tile = 64;         ///< rows of a sampled block and keys of the tiles that are compared
  std::int64_t query_blocks = 8;  ///< sampled evenly over the blocks that see at least 4 tiles
  std::int64_t sink_tokens = 4;   ///< left out of the sink-free mass
  int threads = 0;
};

/// Means over sampled rows, heads and sequences. Mass is softmax probability of dense attention.
struct SelectionQuality {
  double mass = 1;                 ///< of the computed pairs
  double mass_p5 = 1;              ///< 5th percentile over rows
  double sink_free_mass = 1;       ///< without the first tokens, in numerator and denominator
  double value_weighted_mass = 1;  ///< each pair weighted by the norm of its value
  /// Per block, of tiles that the plan touches, k of them: share that is among the k tiles of largest mass, and mass of
  /// the k touched ones over that of the k best.
  double tile_recall = 1;
  double mass_efficiency = 1;
  double oracle_tile_mass = 1;   ///< mass of the best tiles, as many as the pairs of a block fill
  double oracle_token_mass = 1;  ///< mass of as many keys per row as the plan computes, the best ones
  double random_mass = 1;  ///< expected of as many tiles, the first and the last visible among them, others at random

  /// Where mass is lost: 1 - mass = budget + granularity + estimator. The last is negative where single keys were
  /// chosen better than any tiles.
  double budget_loss() const { return 1 - oracle_token_mass; }
  double granularity_loss() const { return oracle_token_mass - oracle_tile_mass; }
  double estimator_loss() const { return oracle_tile_mass - mass; }
  /// (mass - random) / (oracle tiles - random); 1 where the two agree.
  double chance_corrected() const;
};

/// Judges the raw keys of a plan. Cost is rows * N * D per sampled block and head, memory a block's rows times N.
/// Throws Error for modifiers that change scores.
SelectionQuality judge_selection(const Plan& plan, const AttentionInputs& inputs, const QualityOptions& options = {});

}  // namespace tessera::eval
