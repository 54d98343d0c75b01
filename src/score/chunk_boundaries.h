// Where a sequence of keys changes its subject: boundaries of chunks, and chunks as single vectors.
//
// DHSA (arXiv 2510.24606): a small network scores every gap between two tokens; the best gaps, not too close to each
// other, cut the sequence.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace tessera::score {

/// Weights of the boundary predictor, row-major as [out][in].
struct BoundaryWeights {
  std::int64_t channels = 0;
  std::int64_t heads = 8;            ///< divides channels
  std::int64_t window = 4;           ///< tokens looked at on each side of a gap
  std::vector<float> in_weight;      ///< [3 * channels][channels]: queries, keys, values
  std::vector<float> in_bias;        ///< [3 * channels]
  std::vector<float> out_weight;     ///< [channels][channels]
  std::vector<float> out_bias;       ///< [channels]
  std::vector<float> norm_weight;    ///< [channels]
  std::vector<float> norm_bias;      ///< [channels]
  std::vector<float> pool_gate;      ///< [channels]; empty: each side is pooled by its mean
  std::vector<float> hidden_weight;  ///< [hidden][4 * channels + 1]
  std::vector<float> hidden_bias;    ///< [hidden]
  std::vector<float> score_weight;   ///< [hidden]
  float score_bias = 0;
};

/// scores[t] of a boundary behind token t, for rows [tokens][channels]. Self-attention without positions over the
/// `window` tokens on either side of the gap (zeros beyond the ends take part), LayerNorm, each side pooled to one
/// vector, and two linear layers over both, their difference, product and cosine.
std::vector<float> predict_boundaries(const BoundaryWeights& weights, std::span<const float> rows, int threads);

/// scores[t] = -cosine of the means of the `window` rows before and behind the gap after t; what lies beyond the ends
/// is zero. Without weights to be trained.
std::vector<float> boundaries_by_cosine(std::span<const float> rows, std::int64_t channels, std::int64_t window,
                                        int threads);

/// Positions t with scores[t] > least, best first, none within `apart` of a better one, at most `most`; ties go to the
/// smaller position. The first window - 1 and the last `window` positions are left out. Ascending; NaN counts as best.
std::vector<std::int32_t> pick_boundaries(std::span<const float> scores, float least, std::int64_t window,
                                          std::int64_t apart, std::int64_t most);

/// Sums of the rows between neighbouring borders, divided by the square root of their number: the mean times that root,
/// whose size does not depend on the length for independent rows. Borders ascend from 0; [borders - 1][channels].
std::vector<float> pool_chunks(std::span<const float> rows, std::int64_t channels,
                               std::span<const std::int32_t> borders, int threads);

}  // namespace tessera::score
