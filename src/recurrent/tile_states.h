// Linear attention over chosen tiles of keys: what its driver and its kernel text share.
//
// With phi a feature map over channels, tile b of keys has the state H_b = phi(K_b)^T V_b and z_b = column sums of
// phi(K_b). A tile of queries that reads the tiles M has the state H, z summed over M, and
//   O = phi(Q) H / (floor + phi(Q) . z),   0 where nothing is read.
// Backward, with u = phi(Q) / denominator and delta = rows of dO . O: dH = u^T dO, dz = -u^T delta,
// d phi(Q) = (dO H^T - delta z^T) / denominator; with SH and Sz summed over the query tiles that read a tile of keys,
// d phi(K) = V SH^T + Sz, dV = phi(K) SH.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tessera/core.h"

namespace tessera {

/// Feature map of queries and keys, over the channels of a row.
enum class FeatureMap : std::uint8_t { softmax, elu, relu };

namespace recurrent {

/// What holds for every tile of a call. Rows in float are padded with zeros to whole 16 columns and lie an odd number
/// of 16 floats apart, so that walking down a column does not fall into few cache sets.
struct TileStateShape {
  std::int64_t head_dim = 0;
  std::int64_t value_dim = 0;
  std::int64_t key_columns = 0;    ///< head_dim rounded up to 16
  std::int64_t value_columns = 0;  ///< value_dim rounded up to 16
  std::int64_t key_stride = 0;
  std::int64_t value_stride = 0;
  std::int64_t state_floats = 0;  ///< H [key_columns][value_stride], z [key_columns], padding
  FeatureMap map = FeatureMap::softmax;
  float floor = 0;

  std::int64_t vector_at() const { return key_columns * value_stride; }
};
TileStateShape tile_state_shape(std::int64_t head_dim, std::int64_t value_dim, FeatureMap map, float floor);

/// Rows of one tile, wherever they lie.
struct TileRows {
  const std::byte* const* rows = nullptr;
  DType dtype = DType::f32;
  std::int64_t count = 0;
};
struct TileOutputRows {
  std::byte* const* rows = nullptr;
  DType dtype = DType::f32;
};

/// The learned projection behind the branch.
struct Projection {
  const float* weight = nullptr;      ///< W [value_columns][value_stride], [in][out]
  const float* transposed = nullptr;  ///< [out][in], of the same strides
  const float* bias = nullptr;        ///< [value_columns]
};

/// Scratch of one thread for tiles of up to `rows` rows.
struct TileStateScratch {
  float* phi;      ///< [rows][key_stride]
  float* d_phi;    ///< [rows][key_stride]
  float* o;        ///< [rows][value_stride]
  float* d_o;      ///< [rows][value_stride]
  float* d_o_in;   ///< [rows][value_stride], before the projection
  float* panels;   ///< transposed state
  float* inverse;  ///< [rows] 1 / denominator
  float* vector;   ///< [key_columns]
};

/// Which of the states a sum is made of: those listed, or all but those.
struct StateList {
  const std::int32_t* states = nullptr;
  std::int64_t count = 0;
  bool all_but = false;
};
/// Sums of states, one per list.
struct StateSums {
  const float* states = nullptr;  ///< [count][state_floats]
  std::int64_t count = 0;
  std::int64_t state_floats = 0;
  const StateList* lists = nullptr;
  std::int64_t sums = 0;
  float* out = nullptr;  ///< [sums][state_floats]
  bool add = false;      ///< to what is there
};
/// Floats of a state that are summed at a time: those of 128 states fit a first-level cache.
inline constexpr std::int64_t kSumFloats = 64;

/// A tile of queries in the backward pass.
struct QueryTileGradient {
  TileRows q;
  TileRows d_o;
  float* state = nullptr;     ///< H, z; becomes dH, dz
  float* d_q = nullptr;       ///< [count][head_dim]
  float* shares = nullptr;    ///< [count] += dO . (O W + b)
  float* d_weight = nullptr;  ///< [value_columns][value_stride] += O^T dO; null: not wanted
  float* d_bias = nullptr;    ///< [value_columns] += column sums of dO; null: not wanted
};

/// The kernel text of one instruction set. Every function runs on one thread.
struct TileStateKernels {
  /// state = H_b, z_b.
  void (*key_state)(const TileStateShape& shape, const TileRows& k, const TileRows& v, float* state,
                    const TileStateScratch& scratch);
  /// Floats [first, last) of the sums, multiples of kSumFloats.
  void (*sum)(const StateSums& sums, std::int64_t first, std::int64_t last);
  /// to += O W + b.
  void (*query_tile)(const TileStateShape& shape, const TileRows& q, const float* state, const Projection& projection,
                     const TileOutputRows& to, const TileStateScratch& scratch);
  void (*query_tile_backward)(const TileStateShape& shape, const QueryTileGradient& tile, const Projection& projection,
                              const TileStateScratch& scratch);
  /// d_k [count][head_dim], d_v [count][value_dim] from the summed SH, Sz.
  void (*key_tile_backward)(const TileStateShape& shape, const TileRows& k, const TileRows& v, const float* state,
                            float* d_k, float* d_v, const TileStateScratch& scratch);
};

}  // namespace recurrent
}  // namespace tessera
