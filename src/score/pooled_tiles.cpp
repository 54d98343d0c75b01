#include "score/pooled_tiles.h"

#include <algorithm>
#include <cassert>

#include "score/product.h"
#include "score/row_access.h"

namespace tessera::score {

namespace {

/// load(first, count, out) fills rows; means are taken tile by tile.
template <class Load>
std::vector<float> pool(std::int64_t rows, std::int64_t tile, std::int64_t dim, LastTile last, const Load& load) {
  const std::int64_t tiles = (rows + tile - 1) / tile;
  std::vector<float> means(static_cast<std::size_t>(tiles * dim), 0.0F);
  std::vector<float> buffer(static_cast<std::size_t>(tile * dim));
  for (std::int64_t t = 0; t < tiles; ++t) {
    const std::int64_t count = std::min(tile, rows - t * tile);
    load(t * tile, count, buffer.data());
    float* mean = means.data() + t * dim;
    for (std::int64_t r = 0; r < count; ++r) {
      for (std::int64_t d = 0; d < dim; ++d) mean[d] += buffer[r * dim + d];
    }
    const float divisor = static_cast<float>(last == LastTile::padded_rows ? tile : count);
    for (std::int64_t d = 0; d < dim; ++d) mean[d] /= divisor;
  }
  return means;
}

}  // namespace

std::vector<float> pool_queries(const Problem& problem, const AttentionInputs& inputs, std::int64_t sequence,
                                std::int64_t q_head, std::int64_t tile, LastTile last) {
  return pool(problem.q_len_of(sequence), tile, problem.head_dim, last,
              [&](std::int64_t first, std::int64_t count, float* out) {
                load_queries(problem, inputs, sequence, q_head, first, count, out);
              });
}

std::vector<float> pool_keys(const Problem& problem, const AttentionInputs& inputs, std::int64_t sequence,
                             std::int64_t kv_head, std::int64_t tile, LastTile last) {
  return pool(problem.kv_len_of(sequence), tile, problem.head_dim, last,
              [&](std::int64_t first, std::int64_t count, float* out) {
                load_keys(problem, inputs, sequence, kv_head, first, count, out);
              });
}

void pooled_scores(std::span<const float> queries, std::span<const float> keys, std::int64_t dim, std::int64_t first,
                   std::int64_t rows, float scale, std::span<float> scores) {
  const auto key_tiles = static_cast<std::int64_t>(keys.size()) / dim;
  assert(static_cast<std::int64_t>(scores.size()) == rows * key_tiles);
  if (rows == 0 || key_tiles == 0) return;
  multiply_transposed(queries.data() + first * dim, rows, dim, keys.data(), key_tiles, dim, dim, scale, scores.data(),
                      key_tiles);
}

}  // namespace tessera::score
