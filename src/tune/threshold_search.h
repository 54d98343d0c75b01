// Thresholds of XAttention per head (XAttention: Block Sparse Attention with Antidiagonal Scoring, arXiv:2503.16428):
// as its code profiles them, and by the dynamic program of the paper.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "tessera/attention.h"

namespace tessera::tune {

/// How the method scores tiles; see its parameters.
struct TileScoring {
  std::int64_t stride = 16;
  std::int64_t block = 128;
  double norm = 1;
};

/// The share of the method's score mass, per query head, that its tiles from the least one on hold which is needed:
/// needed are, in each row of tiles, the fewest tiles that hold `coverage` of the exact softmax mass.
std::vector<double> profiled_thresholds(const Problem& problem, const AttentionInputs& inputs,
                                        const TileScoring& scoring, double coverage, int threads = 0);

/// What the method keeps at each of these thresholds.
struct ThresholdOutcome {
  std::vector<double> mass;     ///< [query head][threshold]: share of the exact softmax mass, mean over rows
  std::vector<double> density;  ///< [query head][threshold]: share of the visible tiles
};
ThresholdOutcome outcome_of_thresholds(const Problem& problem, const AttentionInputs& inputs,
                                       const TileScoring& scoring, std::span<const double> thresholds, int threads = 0);

/// How often each head's threshold is lowered. quality[head][steps] is what a head contributes after so many steps;
/// D[h][m] = max over j of D[h - 1][m - j] + quality[h][j] is the best sum with exactly m steps among the first h
/// heads. Returned is the largest m <= most_steps whose best sum is at least `least_share` of that without any step.
std::vector<std::int64_t> lower_thresholds(const std::vector<std::vector<double>>& quality, std::int64_t most_steps,
                                           double least_share);

}  // namespace tessera::tune
