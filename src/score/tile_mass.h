// Softmax mass of key tiles per query tile, streamed over key panels: never N x N.
//
// With stride 1 this is the exact block mass of dense attention, W[i][j] = sum of P[r][c] over rows r of query tile i
// and keys c of key tile j (the recall oracle). With stride S it is the antidiagonal score of XAttention
// (arXiv 2503.16428): S consecutive keys are joined into one vector of S * D, S consecutive queries likewise in
// reverse order, so that one dot product is the sum along the antidiagonal of an S x S patch. The largest probability
// of a tile instead of the sum is what ProxyAttn (2509.24745) ranks tiles by.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "score/query_tiles.h"
#include "tessera/attention.h"

namespace tessera::score {

/// What a tile's probabilities are reduced to, over all rows of the query tile.
enum class TileStatistic : std::uint8_t { sum, maximum };

struct TileMassOptions {
  std::int64_t tile_q = 128;
  std::int64_t tile_k = 128;
  std::int64_t stride = 1;  ///< divides both tiles
  float scale = 1;          ///< factor of the dot products of joined vectors
  TileStatistic statistic = TileStatistic::sum;
  std::int64_t query_step = 1;  ///< take every query_step-th group of queries only; stride * query_step divides tile_q
};

/// Working memory of one thread; reused between calls.
struct TileMassBuffers {
  std::vector<float> queries;
  std::vector<float> keys;
  std::vector<float> scores;
  std::vector<float> panel_maximum;
  std::vector<float> tile_sum;
  std::vector<float> tile_peak;
};

/// Query tiles that one call should take together to keep the matrix product efficient.
std::int64_t tiles_per_band(const TileMassOptions& options);

/// mass[t][j] for query tiles first_tile + t, t < tiles: [tiles][key tiles], zero where nothing is visible: the
/// statistic of the probabilities in the tile. A row of
/// groups whose softmax is undefined (NaN or infinite scores) makes the tiles it sees NaN, which budgets keep.
void tile_mass(const Problem& problem, const AttentionInputs& inputs, std::int64_t sequence, std::int64_t q_head,
               const TileMassOptions& options, std::int64_t first_tile, std::int64_t tiles, std::span<float> mass,
               TileMassBuffers& buffers);

}  // namespace tessera::score
