// What the common scheduling of the backward pass and its kernel text share. Plain data only.
#pragma once

#include "kernels/backward.h"
#include "kernels/cpu/tile.h"

namespace tessera::kernels {

/// Sizes of one backward call. Rows of q, k, dO and v are staged as compute words (floats, or pairs of bf16) and packed
/// from there; "queries" stands for q and k, "outputs" for dO and v.
struct BackwardShape {
  TileShape keys;     ///< what the group collector packs: keys alone
  TileShape queries;  ///< staged rows of q as a value panel
  TileShape outputs;  ///< staged rows of dO as a value panel
  bool pair_product;
  std::int64_t query_words;   ///< words of a staged row of q or k
  std::int64_t output_words;  ///< words of a staged row of dO or v
  std::int64_t query_stride;  ///< the same rounded up to 16
  std::int64_t output_stride;
  std::int64_t row_floats;  ///< floats of one key in a lane's sums: dK columns, then dV columns
};
BackwardShape backward_shape_of(const Problem& problem, DType key_dtype, bool pair_product);

/// How scores become probabilities; see ScoreRule. There is no running maximum, so any sign of the scale will do.
struct BackwardRule {
  float to_natural;  ///< product -> natural-unit score
  float to_log2;     ///< product (or, when modified, score) -> exponent of 2
  bool modified;
  bool wants_bias;  ///< gradients of key bias or log-weights are wanted
  RowWeights weights;
};

/// Sums of the gradients of all keys of one (sequence, kv head), written by one thread at a time. The query rows of the
/// pair are dealt out over a fixed number of lanes, which are added in order: that is why results do not depend on the
/// number of threads.
struct BackwardLane {
  float* keys;                       ///< [keys of all sources][row_floats]
  const std::int64_t* source_begin;  ///< first key of each source in `keys`
  float* bias;                       ///< [heads of the group][keys of all sources]; null: not wanted
  std::int64_t bias_stride;          ///< keys of all sources
};

/// Scratch of one thread beside TileScratch.
struct BackwardScratch {
  std::uint32_t* q_rows;    ///< [16][query_stride] staged queries, where they do not lie as compute words
  std::uint32_t* o_rows;    ///< [16][output_stride] staged dO
  std::byte* zero_row;      ///< compute words of a row of zeros
  std::uint32_t* q_panels;  ///< per 16 queries: [words][16]
  std::uint32_t* o_panels;
  std::uint32_t* q_values;  ///< per 16 queries: value panel
  std::uint32_t* o_values;
  std::uint32_t* k_rows;                     ///< [kBlockKeys][query_stride]
  std::uint32_t* v_rows;                     ///< [kBlockKeys][output_stride]
  std::uint32_t* k_values;                   ///< per 16 keys: value panel of k
  float* scores;                             ///< [kGroupKeys][kTileRows], dS where it is wanted in floats
  float* d_probabilities;                    ///< [kGroupKeys][kTileRows]
  float* p_rows;                             ///< [kGroupKeys][kTileRows] numbers as multiplied
  float* ds_rows;                            ///< [kGroupKeys][kTileRows] numbers as multiplied
  std::uint32_t* ds_panels;                  ///< per 16 keys and 16 queries: [keys or pairs][16 queries]
  std::uint32_t* ds_turned;                  ///< [kTileRows][kBlockKeys] numbers as multiplied
  float* d_q;                                ///< [kTileRows][head_dim rounded up to 16]
  float* spare_rows;                         ///< [kGroupKeys + 1][row_floats]: repeated keys, and lanes without a key
  float* delta;                              ///< [kTileRows] sum(dO * O) - dLSE
  float* shift;                              ///< [kTileRows] -LSE as an exponent of 2
  float* slope;                              ///< [kTileRows] ALiBi
  float* query_scale;                        ///< [kTileRows]
  float* inverse_sum;                        ///< [kTileRows] exp(-LSE), 0 for rows without weight: no softmax
  float* weight_factor;                      ///< [kTileRows] of reweighted rows
  float* d_weight_factor;                    ///< [kTileRows]
  std::int32_t slab_lowest[kTileRows / 16];  ///< positions of 16 rows
  std::int32_t slab_highest[kTileRows / 16];
  std::int32_t slabs;
};
std::size_t backward_scratch_bytes(const BackwardShape& shape);
void place_backward_scratch(const BackwardShape& shape, std::byte* memory, BackwardScratch& scratch);

/// One number per query row of a call, by lse_index.
struct BackwardRows {
  float* deltas;  ///< sum(dO * O) - dLSE, 0 for rows without weight
  float* shifts;  ///< -LSE as an exponent of 2; NaN where q or dO holds NaN or Inf
};

/// Everything a job of a backward call reads.
struct BackwardJobContext {
  const BackwardCall& call;
  const BackwardShape& shape;
  const BackwardRule& rule;
  const PackedSource* sources;
  const BackwardRows& rows;
  const BackwardLane& lane;
};

/// Entry points of the backward pass in one instruction set.
struct BackwardKernels {
  /// Gradients of a tile of query rows: writes dQ, adds to the lane's dK and dV.
  void (*backward_tile)(const BackwardJobContext& context, const TileJob& job, TileScratch& scratch,
                        BackwardScratch& own);
  /// The same for a range of queries with few rows per plan row, key tile by key tile; `d_q` holds
  /// [queries][heads][head_dim rounded up to 16].
  void (*backward_key_major)(const BackwardJobContext& context, const KeyMajorJob& job,
                             const SelectionsByTile& selected, TileScratch& scratch, BackwardScratch& own, float* d_q);
  /// The numbers of queries [first, last) of a head.
  void (*backward_row_numbers)(const BackwardCall& call, std::int64_t sequence, std::int64_t head, std::int64_t first,
                               std::int64_t last, const BackwardRows& rows);
  /// row[0..count) = factor * sum over the lanes, which lie `lane_stride` floats apart, in `dtype`.
  void (*sum_lanes)(const float* sums, std::int64_t lanes, std::int64_t lane_stride, float factor, std::int64_t count,
                    DType dtype, std::byte* row);
};

const BackwardKernels& backward_portable();
const BackwardKernels& backward_avx2();
const BackwardKernels& backward_avx512();
const BackwardKernels& backward_avx512_bf16();
const BackwardKernels& backward_neon();

}  // namespace tessera::kernels
