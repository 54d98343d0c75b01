// Means of tiles, and how alike their tokens are: SpargeAttn (arXiv 2502.18137) trusts a mean only where they are.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "tessera/attention.h"

namespace tessera::score {

struct SimilarTiles {
  std::vector<float> means;       ///< [tiles][head_dim], over the real tokens
  std::vector<float> similarity;  ///< [tiles]: mean cosine of all pairs of tokens; NaN where a token is 0 or undefined
};

/// Query tiles of (sequence, query head).
SimilarTiles similar_queries(const Problem& problem, const AttentionInputs& inputs, std::int64_t sequence,
                             std::int64_t q_head, std::int64_t tile);

/// Key tiles of (sequence, key/value head), relative to `centre` [head_dim] where that is not empty.
SimilarTiles similar_keys(const Problem& problem, const AttentionInputs& inputs, std::int64_t sequence,
                          std::int64_t kv_head, std::int64_t tile, std::span<const float> centre);

/// Mean of all keys of a head; 0 in channels where it is not finite.
std::vector<float> mean_key(const Problem& problem, const AttentionInputs& inputs, std::int64_t sequence,
                            std::int64_t kv_head);
/// Mean of all queries of a head, likewise.
std::vector<float> mean_query(const Problem& problem, const AttentionInputs& inputs, std::int64_t sequence,
                              std::int64_t q_head);

}  // namespace tessera::score
