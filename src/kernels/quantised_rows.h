// Rows as signed bytes in tiles of one scale each, packed for products of bytes: the keys of 8-bit attention, and of
// estimates by fewer levels (4-bit numbers are bytes of 7 levels).
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "kernels/cpu/aligned_buffer.h"
#include "kernels/cpu/bytes.h"

namespace tessera::kernels {

/// Largest levels of 8 and of 4 bits.
constexpr float kLevels8 = 127;
constexpr float kLevels4 = 7;

/// Writes row `place` as `dim` floats.
using LoadRow = std::function<void(std::int64_t place, float* row)>;

/// Rows in tiles: number = byte * scale of its tile, rounded half away from zero (SageAttention, arXiv:2410.02367).
/// Rows that hold NaN or Inf are 0 and mark their tile.
struct QuantisedRows {
  std::int64_t rows = 0;
  std::int64_t dim = 0;
  std::int64_t tile = 0;    ///< rows of one scale
  std::int64_t stride = 0;  ///< places of a tile: `tile` rounded up to 16
  std::int64_t words = 0;   ///< of four bytes in a row
  AlignedBuffer panels;     ///< [tiles][stride / 16][words rounded up to 16][16 rows]
  std::vector<float> scales;
  std::vector<std::int32_t> shift_sums;  ///< [tiles][stride] kByteShift times the sum of a row's bytes
  std::vector<std::uint8_t> spoilt;      ///< [tiles] 1: a row holds NaN or Inf

  std::int64_t tiles() const { return static_cast<std::int64_t>(scales.size()); }
  std::int64_t panel_words() const { return (words + 15) / 16 * 256; }
  const std::uint32_t* tile_panels(std::int64_t t) const {
    return reinterpret_cast<const std::uint32_t*>(panels.data()) + t * (stride / 16) * panel_words();
  }
};

/// Levels go from -levels to levels; at most kLevels8.
QuantisedRows quantise_rows(const ByteKernels& kernels, std::int64_t rows, std::int64_t dim, std::int64_t tile,
                            float levels, int threads, const LoadRow& load);

/// A few rows of one scale as bytes plus `shift`, one after another.
struct ByteRowBlock {
  std::vector<float> numbers;  ///< [rows][dim rounded up to 64]; load them here
  std::vector<float> scales;
  std::vector<std::uint8_t> bytes;   ///< [rows][stride]
  std::vector<std::uint8_t> spoilt;  ///< [rows] 1: NaN or Inf; its bytes are those of 0
  std::int64_t stride = 0;

  ByteRowBlock(std::int64_t rows, std::int64_t dim);
  float* row(std::int64_t r) { return numbers.data() + r * stride; }
  /// Rounds the first `rows` rows and returns their scale.
  float quantise(const ByteKernels& kernels, std::int64_t rows, float levels, std::int32_t shift);
};

}  // namespace tessera::kernels
