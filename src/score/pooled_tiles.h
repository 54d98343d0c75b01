// Tiles of queries and keys as their means, and the scores of mean against mean.
//
// Block-sparse heads of MInference (arXiv 2407.02490): 64 x 64, no scale, no softmax, padding inside the last mean.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "tessera/attention.h"

namespace tessera::score {

/// What the mean of a ragged last tile divides by.
enum class LastTile : std::uint8_t {
  real_rows,   ///< the tokens it has
  padded_rows  ///< the tile height, as if zero rows were appended
};

/// Means of the query tiles of (sequence, query head): [tiles][head_dim].
std::vector<float> pool_queries(const Problem& problem, const AttentionInputs& inputs, std::int64_t sequence,
                                std::int64_t q_head, std::int64_t tile, LastTile last);

/// Means of the key tiles of (sequence, key/value head): [tiles][head_dim].
std::vector<float> pool_keys(const Problem& problem, const AttentionInputs& inputs, std::int64_t sequence,
                             std::int64_t kv_head, std::int64_t tile, LastTile last);

/// scores[i][j] = scale * queries[first + i] . keys[j] for i < rows: [rows][key tiles].
void pooled_scores(std::span<const float> queries, std::span<const float> keys, std::int64_t dim, std::int64_t first,
                   std::int64_t rows, float scale, std::span<float> scores);

}  // namespace tessera::score
