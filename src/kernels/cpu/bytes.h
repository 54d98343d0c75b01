// What the common code of quantised kernels and their text share: rows as bytes, products of bytes, attention on them.
// Plain data only.
#pragma once

#include <cstdint>

#include "kernels/cpu/blocks.h"
#include "tessera/attention.h"

namespace tessera::kernels {

/// Rows that stand as unsigned bytes in a product are signed ones plus this.
constexpr std::int32_t kByteShift = 128;
/// Unnormalised probabilities are bytes 0 to this, of one constant scale: exact for the maximum of a row.
constexpr float kProbabilityLevels = 127;
/// Query rows of one job.
constexpr std::int64_t kByteRows = 64;

/// Keys and values of one (sequence, head) as bytes in tiles. A tile has `stride` places, a multiple of 16; those
/// behind its last key are 0. A word is four bytes.
struct ByteKeys {
  std::int64_t tile;           ///< keys of a tile
  std::int64_t stride;         ///< places of a tile
  std::int64_t keys;           ///< of all tiles
  std::int64_t key_words;      ///< words of a key
  std::int64_t value_columns;  ///< value_dim rounded up to 16
  const std::uint32_t* k;      ///< [tiles][stride / 16][key words rounded up to 16][16 keys]
  const float* k_scales;       ///< [tiles]
  const std::int32_t* k_sums;  ///< [tiles][stride] kByteShift times the sum of the signed bytes of a key
  const std::uint32_t* v;      ///< [tiles][value_columns / 16][stride / 4][16 columns]: a word is four keys of a column
  const std::uint8_t* spoilt;  ///< [tiles] 1: holds NaN or Inf
};

/// Up to kByteRows query rows.
struct ByteRows {
  std::int64_t rows;
  const std::uint8_t* q;  ///< [rows][q_stride] bytes, shifted
  std::int64_t q_stride;
  float to_log2;  ///< scale of the queries x scale of the softmax x log2(e)
};

/// Scratch of one job and its results.
struct ByteScratch {
  float* scores;                ///< [kByteRows][stride]
  std::uint8_t* probabilities;  ///< [kByteRows][stride]
  float* output;   ///< [kByteRows][value_columns], not divided by the sum, without the scales of the columns
  float* maximum;  ///< [kByteRows] of the scores, as exponents of 2
  float* sum;      ///< [kByteRows] of the probabilities before they became bytes
};

/// Entry points of one instruction set.
struct ByteKernels {
  /// Largest |x|; NaN if one of them is NaN or Inf. `count` is a multiple of 16.
  float (*largest_magnitude)(const float* x, std::int64_t count);
  /// bytes[i] = round(x[i] / scales[i]) + shift, halves away from zero. `count` is a multiple of 16; every |x / scale|
  /// is below 128.
  void (*to_bytes)(const float* x, const float* scales, std::int64_t count, std::int32_t shift, std::uint8_t* bytes);
  /// panel[word][row] = word of rows[row], 16 rows of `words` words; words is a multiple of 16.
  void (*pack_rows)(const std::uint8_t* const* rows, std::int64_t words, std::uint32_t* panel);
  /// products[row][16 panel + column] = sum over the words of a row of shifted bytes times panels [word][16], which lie
  /// `panel_stride` words apart. Exact in 32 bits up to 2^15 words.
  void (*multiply)(const std::uint8_t* rows, std::int64_t row_stride, std::int64_t row_count,
                   const std::uint32_t* panels, std::int64_t panel_stride, std::int64_t panel_count, std::int64_t words,
                   std::int32_t* products, std::int64_t product_stride);
  /// Adds key tiles, in this order, to the states of all rows.
  void (*attend)(const ByteKeys& keys, const ByteRows& rows, const std::int32_t* tiles, std::int64_t tile_count,
                 const ByteScratch& scratch);
  /// What ByteActivations holds of `count` activations, a multiple of 32. `bytes`, `paired`, `quartered`, `sums` and
  /// `group_weights` may be null.
  void (*quantise_activations)(const float* x, std::int64_t count, std::int8_t* bytes, std::int8_t* paired,
                               std::int8_t* quartered, float* scales, float* sums, float* sums_of_groups,
                               float* group_weights);
  /// y[r * y_stride + o] for at most kBlockRows rows of activations.
  void (*multiply_blocks)(const BlockRows& weights, const ByteActivations& x, float* y, std::int64_t y_stride);
  /// Whole blocks of quantised types as floats, up to rounding what dequantise() gives.
  void (*widen_blocks)(GgmlType type, const std::byte* blocks, std::int64_t numbers, float* out);
};

const ByteKernels& bytes_portable();
const ByteKernels& bytes_avx2();
const ByteKernels& bytes_avx512();
const ByteKernels& bytes_avx512_bf16();
const ByteKernels& bytes_neon();
/// Kernel table of an instruction set (which this machine must be able to run).
const ByteKernels& byte_kernels_of(Isa isa);

}  // namespace tessera::kernels
