// What the common scheduling code and the per-instruction-set kernel text share: sizes, packed sources, jobs, scratch.
// Plain data only, so that nothing here is compiled differently per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "kernels/bitmap_attention.h"
#include "kernels/kernels.h"
#include "kernels/key_rows.h"
#include "kernels/quantized_attention.h"

namespace tessera::kernels {

/// Keys are packed, masked and multiplied 16 at a time; a score block is 8 such groups wide and at most 128 rows high,
/// so that scores, output, queries, keys and values of a block fit half of a 512 KiB L2 at head_dim 128.
constexpr std::int64_t kGroupKeys = 16;
constexpr std::int64_t kBlockGroups = 8;
constexpr std::int64_t kBlockKeys = kGroupKeys * kBlockGroups;
constexpr std::int64_t kTileRows = 128;

/// Sizes of one call in 32-bit words and columns. "Storage" is the dtype in memory, "compute" what the product reads.
struct TileShape {
  std::int64_t head_dim;
  std::int64_t value_dim;
  DType dtype;                   ///< of k and v
  bool pair_product;             ///< products of bf16 pairs instead of floats
  std::int64_t storage_words;    ///< words of a key row in storage dtype
  std::int64_t compute_words;    ///< words of a key row as multiplied
  std::int64_t value_columns;    ///< value_dim rounded up to 16
  std::int64_t k_storage_panel;  ///< words of a group of keys in storage form: [storage words][16 keys]
  std::int64_t k_compute_panel;  ///< ... as multiplied: [compute words][16 keys]
  std::int64_t v_panel;          ///< words of a group of values as multiplied: [columns / 16][16 or 8 pairs][16]
  bool k_widens() const { return !pair_product && dtype != DType::f32; }
};
TileShape tile_shape_of(const Problem& problem, DType dtype, bool pair_product);

/// Keys and values of one source for one (sequence, kv head), packed as far as the workspace allowed.
struct PackedSource {
  KeyRows k;
  KeyRows v;
  std::int64_t keys = 0;
  const std::uint32_t* k_panels = nullptr;        ///< [groups][k_storage_panel]; null: packed on the fly
  const std::uint32_t* v_panels = nullptr;        ///< [groups][v_panel]; null: staged on the fly
  const std::uint8_t* value_nonfinite = nullptr;  ///< [keys] 1 where a value row holds NaN or Inf; null: none does
  const float* log_weight = nullptr;              ///< [keys]; null: all 0
};

/// Rows of the attention matrix that share one plan row: `heads` query heads times `places` queries.
struct TileJob {
  std::int64_t sequence = 0;
  std::int64_t block = 0;     ///< (plan sequence, plan head)
  std::int64_t plan_row = 0;  ///< global row of the plan
  std::int64_t first_head = 0;
  std::int64_t heads = 1;
  std::int64_t first_place = 0;
  std::int64_t places = 0;
  std::int64_t work = 0;  ///< key-row products, for ordering
  std::int64_t rows() const { return heads * places; }
};

/// One group of 16 keys as the block kernel sees it.
struct KeyGroup {
  const std::uint32_t* k;
  const std::uint32_t* v;
  std::uint32_t lanes;  ///< bit i: key i belongs to the plan entry
  bool masked;          ///< some (row, key) pair of the block is not allowed
  bool slow_value;      ///< a value row is NaN or Inf: kept out of the fast product
  std::int32_t left;    ///< band relative to the query position; INT32_MAX: unlimited
  std::int32_t right;
  std::int32_t first_key;  ///< smallest and largest original key index
  std::int32_t last_key;
  const std::uint64_t* bits;  ///< bitmask of row 0 of the plan row; null: none
  std::int64_t bit_words;     ///< words per bitmask row
  std::int64_t first_bit;     ///< bit of lane 0; may be negative where the entry begins inside the group
};

/// Scratch of one thread: views into one aligned buffer.
struct TileScratch {
  std::uint32_t* q;          ///< [rows][q_stride] compute words
  float* scores;             ///< [rows][kBlockKeys]
  float* probabilities;      ///< [rows][kBlockKeys], or half of that in bf16
  float* output;             ///< [rows][value_columns]
  std::uint32_t* k;          ///< [kBlockGroups][k_compute_panel]
  std::uint32_t* v;          ///< [kBlockGroups][v_panel]
  std::uint32_t* k_storage;  ///< [k_storage_panel] before widening
  std::byte* zero_row;       ///< a row of zeros for absent lanes
  std::int64_t q_stride;

  // Per row of the current block.
  const std::uint32_t* q_rows[kTileRows];
  float* output_rows[kTileRows];
  float maximum[kTileRows];  ///< of the unscaled scores
  float shift[kTileRows];    ///< of the block: exponent of 2 = score * ScoreRule::to_log2 + shift
  float sum[kTileRows];
  alignas(64) float lane_sums[kTileRows * kGroupKeys];  ///< [rows][lanes] sums of one block's probabilities
  std::int32_t position[kTileRows];
  std::int32_t query[kTileRows];
  std::int32_t head[kTileRows];
  std::int32_t row_in_tile[kTileRows];

  // Per key of the current block.
  KeyGroup groups[kBlockGroups];
  std::int32_t group_count;
  alignas(64) std::int32_t keys[kBlockKeys];  ///< original key index
  alignas(64) float key_log_weight[kBlockKeys];
  const PackedSource* key_source[kBlockGroups];
  bool any_masked;

  // By-products and online skip, where the call follows maxima.
  float row_peak[kTileRows];                   ///< largest score so far, in the units of `scores`
  float group_peak[kTileRows * kBlockGroups];  ///< [rows][groups] of the current block
  std::uint32_t skipped_groups[kTileRows];     ///< bit g: the row leaves group g of the current block out
  float* tile_peak;                            ///< [rows][tile_peak_count] per key tile; null: not wanted
  std::int64_t tile_peak_count;
  std::int64_t skipped_pairs;

  // Packed panels that the next block will read, where they are known: fetched while this one is computed.
  const std::uint32_t* next_k[kBlockGroups];
  const std::uint32_t* next_v[kBlockGroups];
  std::int32_t next_count;
};

/// What a call asks of every row, worked out once.
struct ScoreRule {
  float query_factor;  ///< multiplies q before the product (float products) or is +-1 (pair products)
  float to_natural;    ///< raw product -> natural-unit score, when modifiers look at scores
  float from_natural;  ///< natural-unit score -> modified score: an exponent of 2, but for weights that are no softmax
  float to_log2;       ///< raw or modified score -> exponent of 2; 1 but for pair products that nothing modifies
  bool modified;       ///< modifiers or log-weights change scores
  RowWeights weights;  ///< others than softmax imply `modified`; their rows keep the maximum 0
  /// The maximum of a row that has seen no key.
  float first_maximum() const {
    return weights == RowWeights::softmax ? -std::numeric_limits<float>::infinity() : 0.0F;
  }
};

/// Bytes of scratch that TileScratch points into.
std::size_t scratch_bytes(const TileShape& shape, bool with_queries);
/// Sets pointers, counts and the row of zeros, nothing else; `memory` is 64-byte aligned and holds scratch_bytes.
void place_scratch(const TileShape& shape, bool with_queries, std::byte* memory, TileScratch& scratch);

/// One (sequence, kv head or q head) of a key-major call: a range of queries with all keys they selected.
struct KeyMajorJob {
  std::int64_t sequence = 0;
  std::int64_t block = 0;
  std::int64_t first_head = 0;
  std::int64_t heads = 1;
  std::int64_t first_query = 0;
  std::int64_t queries = 0;
};

/// A query tile of the plan that selected a key tile.
struct Selection {
  std::int32_t plan_row;  ///< local to the job
  std::int32_t entry;     ///< index into the plan row's entries
};

/// Queries of a job grouped by key tile, CSR over the key tiles that occur.
struct SelectionsByTile {
  const std::int32_t* tiles;  ///< [tile_count] key tile numbers, ascending
  const std::int64_t* begin;  ///< [tile_count + 1]
  const Selection* selections;
  std::int64_t tile_count;
};

/// One piece of a split-key row: entries from (entry, offset) on, `keys` keys in all.
struct SplitPiece {
  std::int64_t first_entry = 0;  ///< global index of the entry
  std::int64_t offset = 0;       ///< keys of it that belong to earlier pieces
  std::int64_t keys = 0;
};

/// Query rows quantised to 4 bits, as the estimate reads them.
struct LowBitQueries {
  std::int64_t rows;
  std::int64_t words;          ///< 4 channels each
  const std::int8_t* numbers;  ///< [rows][words][4] in -7..7
  const float* scale;          ///< [rows]
  const std::int32_t* sum;     ///< [rows] sum of the numbers
  const float* cut;            ///< [rows]
};

/// Keys quantised to 4 bits. The estimate of a pair is scale of the row * scale of the key * product + offset.
struct LowBitKeys {
  const std::uint8_t* panels;  ///< [groups][words][16 keys][4], numbers plus kLowBitOffset
  const float* scale;          ///< [groups * 16]
  const float* offset;         ///< [groups * 16]; -inf for keys past the end
};
/// What makes signed 4-bit numbers unsigned, for products of unsigned with signed bytes.
constexpr std::int32_t kLowBitOffset = 8;

struct BackwardKernels;

/// Entry points of one instruction set. Every function is one block of work on one thread.
struct LevelKernels {
  bool pairs_bf16;  ///< multiplies bf16 pairs
  /// Packs groups [first, last) of a source; either panel pointer may be null.
  void (*pack)(const TileShape& shape, const PackedSource& source, std::int64_t first_group, std::int64_t last_group,
               std::uint32_t* k_panels, std::uint32_t* v_panels);
  void (*attend_tile)(const Call& call, const TileShape& shape, const ScoreRule& rule, const TileJob& job,
                      const PackedSource* sources, TileScratch& scratch);
  void (*attend_key_major)(const Call& call, const TileShape& shape, const ScoreRule& rule, const KeyMajorJob& job,
                           const SelectionsByTile& selected, const PackedSource* sources, TileScratch& scratch,
                           float* accumulators);
  /// Partial result of one piece: maximum and sum [rows], output [rows][value_columns], not divided by the sum.
  void (*attend_piece)(const Call& call, const TileShape& shape, const ScoreRule& rule, const TileJob& job,
                       const SplitPiece& piece, const PackedSource* sources, TileScratch& scratch, float* maximum,
                       float* sum, float* output);
  /// Merges the pieces of a row tile in order and writes its output rows. Arrays are [pieces][rows] and
  /// [pieces][rows][value_columns].
  void (*merge_pieces)(const Call& call, const TileShape& shape, const ScoreRule& rule, const TileJob& job,
                       std::int64_t pieces, const float* maximum, const float* sum, float* output);
  /// 1 for every value row of [first, last) that holds NaN or Inf.
  bool (*find_nonfinite)(const TileShape& shape, const PackedSource& source, std::int64_t first, std::int64_t last,
                         std::uint8_t* flags);
  /// Adds a batch of compressed tokens to the states of all rows: maximum [rows] in powers of 2, sum [rows], output
  /// [rows][value_dim rounded up to 64]. Queries are scaled by log2(e).
  void (*attend_bitmap)(const BitmapProblem& problem, const BitmapTiles& keys, const BitmapTiles& values,
                        const float* queries, float* maximum, float* sum, float* output);
  /// The same for blocks [first, last) of a batch of quantised tokens; query rows are quantized_query_stride() floats
  /// apart, zeros at the end. `scratch` holds quantized_scratch_bytes().
  void (*attend_quantized)(const QuantizedProblem& problem, const QuantizedTiles& keys, const QuantizedTiles& values,
                           std::int64_t first, std::int64_t last, const float* queries, float* maximum, float* sum,
                           float* output, std::byte* scratch);
  /// excess[g] = max over the rows and the keys of group first_group + g of the estimated score above the row's cut.
  void (*low_bit_excess)(const LowBitQueries& queries, const LowBitKeys& keys, std::int64_t first_group,
                         std::int64_t groups, float* excess);
  /// Register-only product loop of `iterations` rounds; returns floating-point operations done, `sink` keeps it alive.
  double (*product_loop)(std::int64_t iterations, bool pairs, float* sink);
  /// Sum of a buffer, as fast as it can be read.
  float (*read_loop)(const float* data, std::int64_t count);
  /// The texts with a compile unit of their own.
  const BackwardKernels& (*backward)();
};

const LevelKernels& level_portable();
const LevelKernels& level_avx2();
const LevelKernels& level_avx512();
const LevelKernels& level_avx512_bf16();
const LevelKernels& level_neon();

/// Accumulators of a key-major job in floats: queries, outputs and states of all its rows.
std::int64_t key_major_accumulator_floats(const TileShape& shape, std::int64_t rows);

}  // namespace tessera::kernels
