// Softmax mass of key tiles per query tile, streamed over key panels: never N x N.
//
// With stride 1 this is the exact block mass of dense attention, W[i][j] = sum of P[r][c] over rows r of query tile i
// and keys c of key tile j (the recall oracle). With stride S it is the antidiagonal score of XAttention
// (arXiv 2503.16428): S consecutive keys are joined into one vector of S * D, S consecutive queries likewise in
// reverse order, so that one dot product is the sum along the antidiagonal of an S x S patch.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "score/query_tiles.h"
#include "tessera/attention.h"

namespace tessera::score {

struct TileMassOptions {
  std::int64_t tile_q = 128;
  std::int64_t tile_k = 128;
  std::int64_t stride = 1;  ///< divides both tiles
  float scale = 1;          ///< factor of the dot products of joined vectors
};

/// Working memory of one thread; reused between calls.
struct TileMassBuffers {
  std::vector<float> queries;
  std::vector<float> keys;
  std::vector<float> scores;
  std::vector<float> panel_maximum;
  std::vector<float> tile_sum;
};

/// Query tiles that one call should take together to keep the matrix product efficient.
std::int64_t tiles_per_band(const TileMassOptions& options);

/// mass[t][j] for query tiles first_tile + t, t < tiles: [tiles][key tiles], zero where nothing is visible. A row of
/// groups whose softmax is undefined (NaN or infinite scores) makes the tiles it sees NaN, which budgets keep.
void tile_mass(const Problem& problem, const AttentionInputs& inputs, std::int64_t sequence, std::int64_t q_head,
               const TileMassOptions& options, std::int64_t first_tile, std::int64_t tiles, std::span<float> mass,
               TileMassBuffers& buffers);

}  // namespace tessera::score
