// The forward pass of a learned tile gate, with what its gradients need.
#pragma once

#include <array>
#include <vector>

#include "tessera/gate_training.h"

namespace tessera::score {

/// Throws Error unless tensors and weights fit each other and the problem.
void check_gate(const Problem& problem, const TileGate& gate);

/// Pooled rows of one head: per pooling in use [tiles][head_dim], else empty.
using PooledRows = std::array<std::vector<float>, kTilePoolings>;

PooledRows pooled_queries(const Problem& problem, const TileGate& gate, std::int64_t sequence, std::int64_t q_head);
PooledRows pooled_keys(const Problem& problem, const TileGate& gate, std::int64_t sequence, std::int64_t kv_head);

/// Projections of one query head, rotated, and their scores.
struct GateHead {
  std::vector<float> queries;  ///< [query tiles][width]
  std::vector<float> keys;     ///< [key tiles][width]
  std::vector<float> scores;   ///< [query tiles][key tiles], -inf where nothing is visible
};
GateHead gate_head(const Problem& problem, const TileGate& gate, std::int64_t sequence, std::int64_t q_head,
                   const PooledRows& queries, const PooledRows& keys);

/// Whether queries are projected, and the width of the projections.
bool projects_queries(const TileGate& gate);
std::int64_t gate_width(const TileGate& gate);

/// Rotates row t of [tiles][width] by the position first + t * tile; `direction` -1 turns back.
void rotate_tiles(const TileGate& gate, std::int64_t width, std::int64_t first, int direction,
                  std::vector<float>& rows);

}  // namespace tessera::score
