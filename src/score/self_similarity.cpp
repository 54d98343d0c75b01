#include "score/self_similarity.h"

#include <algorithm>
#include <cmath>

#include "score/exponential.h"
#include "score/row_access.h"

namespace tessera::score {

namespace {

constexpr std::int64_t kRowsAtOnce = 256;

/// mean over a, b of cos(x_a, x_b) = |mean of x / |x||^2, so that no Gram matrix is needed.
template <class Load>
SimilarTiles similar_tiles(std::int64_t rows, std::int64_t dim, std::int64_t tile, std::span<const float> centre,
                           const Load& load) {
  const std::int64_t tiles = (rows + tile - 1) / tile;
  SimilarTiles out;
  out.means.assign(static_cast<std::size_t>(tiles * dim), 0.0F);
  out.similarity.resize(static_cast<std::size_t>(tiles));
  std::vector<float> buffer(static_cast<std::size_t>(tile * dim));
  std::vector<float> squares(static_cast<std::size_t>(dim));
  std::vector<float> direction(static_cast<std::size_t>(dim));
  for (std::int64_t t = 0; t < tiles; ++t) {
    const std::int64_t count = std::min(tile, rows - t * tile);
    load(t * tile, count, buffer.data());
    float* mean = out.means.data() + t * dim;
    std::fill(direction.begin(), direction.end(), 0.0F);
    for (std::int64_t r = 0; r < count; ++r) {
      float* row = buffer.data() + r * dim;
      for (std::size_t d = 0; d < centre.size(); ++d) row[d] -= centre[d];
      for (std::int64_t d = 0; d < dim; ++d) squares[d] = row[d] * row[d];
      const float inverse = 1 / std::sqrt(row_sum(squares.data(), dim));  // a zero row: 0 * inf is NaN, as wanted
      for (std::int64_t d = 0; d < dim; ++d) {
        mean[d] += row[d];
        direction[d] += row[d] * inverse;
      }
    }
    const float share = 1 / static_cast<float>(count);
    for (std::int64_t d = 0; d < dim; ++d) {
      mean[d] *= share;
      squares[d] = direction[d] * share * (direction[d] * share);
    }
    out.similarity[t] = row_sum(squares.data(), dim);
  }
  return out;
}

template <class Load>
std::vector<float> mean_row(std::int64_t rows, std::int64_t dim, const Load& load) {
  std::vector<double> sum(static_cast<std::size_t>(dim), 0.0);
  std::vector<float> buffer(static_cast<std::size_t>(kRowsAtOnce * dim));
  for (std::int64_t first = 0; first < rows; first += kRowsAtOnce) {
    const std::int64_t count = std::min(kRowsAtOnce, rows - first);
    load(first, count, buffer.data());
    for (std::int64_t r = 0; r < count; ++r) {
      for (std::int64_t d = 0; d < dim; ++d) sum[d] += buffer[r * dim + d];
    }
  }
  std::vector<float> mean(static_cast<std::size_t>(dim));
  for (std::int64_t d = 0; d < dim; ++d) {
    const auto x = static_cast<float>(sum[d] / static_cast<double>(std::max<std::int64_t>(1, rows)));
    mean[d] = std::isfinite(x) ? x : 0.0F;
  }
  return mean;
}

}  // namespace

SimilarTiles similar_queries(const Problem& problem, const AttentionInputs& inputs, std::int64_t sequence,
                             std::int64_t q_head, std::int64_t tile) {
  return similar_tiles(problem.q_len_of(sequence), problem.head_dim, tile, {},
                       [&](std::int64_t first, std::int64_t count, float* out) {
                         load_queries(problem, inputs, sequence, q_head, first, count, out);
                       });
}

SimilarTiles similar_keys(const Problem& problem, const AttentionInputs& inputs, std::int64_t sequence,
                          std::int64_t kv_head, std::int64_t tile, std::span<const float> centre) {
  return similar_tiles(problem.kv_len_of(sequence), problem.head_dim, tile, centre,
                       [&](std::int64_t first, std::int64_t count, float* out) {
                         load_keys(problem, inputs, sequence, kv_head, first, count, out);
                       });
}

std::vector<float> mean_key(const Problem& problem, const AttentionInputs& inputs, std::int64_t sequence,
                            std::int64_t kv_head) {
  return mean_row(problem.kv_len_of(sequence), problem.head_dim,
                  [&](std::int64_t first, std::int64_t count, float* out) {
                    load_keys(problem, inputs, sequence, kv_head, first, count, out);
                  });
}

std::vector<float> mean_query(const Problem& problem, const AttentionInputs& inputs, std::int64_t sequence,
                              std::int64_t q_head) {
  return mean_row(problem.q_len_of(sequence), problem.head_dim,
                  [&](std::int64_t first, std::int64_t count, float* out) {
                    load_queries(problem, inputs, sequence, q_head, first, count, out);
                  });
}

}  // namespace tessera::score
