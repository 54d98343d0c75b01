#include "kernels/quantised_rows.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "core/parallel.h"

namespace tessera::kernels {

ByteRowBlock::ByteRowBlock(std::int64_t rows, std::int64_t dim) : stride((dim + 63) / 64 * 64) {
  numbers.resize(static_cast<std::size_t>(rows * stride), 0.0F);
  scales.resize(static_cast<std::size_t>(stride), 1.0F);
  bytes.resize(static_cast<std::size_t>(rows * stride));
  spoilt.resize(static_cast<std::size_t>(rows));
}

float ByteRowBlock::quantise(const ByteKernels& kernels, std::int64_t rows, float levels, std::int32_t shift) {
  float largest = 0;
  for (std::int64_t r = 0; r < rows; ++r) {
    const float magnitude = kernels.largest_magnitude(row(r), stride);
    spoilt[static_cast<std::size_t>(r)] = std::isnan(magnitude) ? 1 : 0;
    if (std::isnan(magnitude)) {
      std::fill_n(row(r), stride, 0.0F);
    } else {
      largest = std::max(largest, magnitude);
    }
  }
  // A scale that underflows would divide by 0: such rows are 0.
  const float scale = largest / levels >= std::numeric_limits<float>::min() ? largest / levels : 1.0F;
  std::fill(scales.begin(), scales.end(), scale);
  for (std::int64_t r = 0; r < rows; ++r) {
    kernels.to_bytes(row(r), scales.data(), stride, shift, bytes.data() + r * stride);
  }
  return scale;
}

QuantisedRows quantise_rows(const ByteKernels& kernels, std::int64_t rows, std::int64_t dim, std::int64_t tile,
                            float levels, int threads, const LoadRow& load) {
  require(levels >= 1 && levels <= kLevels8, "levels is {}; expected 1 to 127", levels);
  QuantisedRows result;
  result.rows = rows;
  result.dim = dim;
  result.tile = tile;
  result.stride = (tile + 15) / 16 * 16;
  result.words = (dim + 3) / 4;
  const std::int64_t tiles = (rows + tile - 1) / tile;
  const std::int64_t panel_words = result.panel_words();
  result.panels = AlignedBuffer(static_cast<std::size_t>(tiles * (result.stride / 16) * panel_words) * 4);
  result.scales.resize(static_cast<std::size_t>(tiles));
  result.shift_sums.resize(static_cast<std::size_t>(tiles * result.stride), 0);
  result.spoilt.resize(static_cast<std::size_t>(tiles), 0);
  parallel_for(tiles, threads, [&](std::int64_t t, int) {
    const std::int64_t count = std::min(tile, rows - t * tile);
    ByteRowBlock block(result.stride, dim);
    for (std::int64_t r = 0; r < count; ++r) load(t * tile + r, block.row(r));
    result.scales[static_cast<std::size_t>(t)] = block.quantise(kernels, result.stride, levels, 0);
    for (std::int64_t r = 0; r < count; ++r) {
      const auto* bytes = reinterpret_cast<const std::int8_t*>(block.bytes.data() + r * block.stride);
      std::int32_t sum = 0;
      for (std::int64_t d = 0; d < dim; ++d) sum += bytes[d];
      result.shift_sums[static_cast<std::size_t>(t * result.stride + r)] = kByteShift * sum;
      if (block.spoilt[static_cast<std::size_t>(r)] != 0) result.spoilt[static_cast<std::size_t>(t)] = 1;
    }
    auto* panel = reinterpret_cast<std::uint32_t*>(result.panels.data()) + t * (result.stride / 16) * panel_words;
    for (std::int64_t r = 0; r < result.stride; r += 16, panel += panel_words) {
      const std::uint8_t* pointers[16];
      for (int i = 0; i < 16; ++i) pointers[i] = block.bytes.data() + (r + i) * block.stride;
      kernels.pack_rows(pointers, (result.words + 15) / 16 * 16, panel);
    }
  });
  return result;
}

const ByteKernels& byte_kernels_of(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx2:
      return bytes_avx2();
    case Isa::avx512:
      return bytes_avx512();
    case Isa::avx512_bf16:
      return bytes_avx512_bf16();
#elif defined(__aarch64__)
    case Isa::neon:
      return bytes_neon();
#endif
    default:
      return bytes_portable();
  }
}

}  // namespace tessera::kernels
