#include "kernels/block_product.h"

#include <algorithm>
#include <vector>

#include "core/parallel.h"
#include "kernels/cpu/bytes.h"

namespace tessera::kernels {

namespace {

/// Bytes of weights that a thread takes at a time: much more than the start of a stream costs.
constexpr std::int64_t kItemBytes = 1 << 16;
/// Matrices below this are read before a second thread has started.
constexpr std::int64_t kSmallBytes = 1 << 17;

/// Owns what ByteActivations refers to.
struct Activations {
  std::vector<std::int8_t> bytes;
  std::vector<float> scales;
  std::vector<float> sums;
  std::vector<float> sums_of_groups;
  std::vector<std::int32_t> shifts;

  ByteActivations quantise(const ByteKernels& kernels, const float* x, std::int64_t rows, std::int64_t inputs) {
    const std::int64_t padded = (inputs + kBlockChunk - 1) / kBlockChunk * kBlockChunk;
    bytes.assign(static_cast<std::size_t>(rows * padded), 0);
    scales.assign(static_cast<std::size_t>(rows * padded / kActivationGroup), 0);
    sums.assign(static_cast<std::size_t>(rows * padded / 16), 0);
    sums_of_groups.assign(static_cast<std::size_t>(rows * padded / 32), 0);
    shifts.assign(static_cast<std::size_t>(rows * padded / 4), 0);
    for (std::int64_t r = 0; r < rows; ++r) {
      kernels.quantise_activations(x + r * inputs, inputs, bytes.data() + r * padded,
                                   scales.data() + r * padded / kActivationGroup, sums.data() + r * padded / 16,
                                   sums_of_groups.data() + r * padded / 32, shifts.data() + r * padded / 4);
    }
    return {rows, padded, bytes.data(), scales.data(), sums.data(), sums_of_groups.data(), shifts.data()};
  }
};

}  // namespace

void multiply_blocks(const BlockRows& weights, const float* x, std::int64_t rows, float* y, int threads, Isa isa) {
  const ByteKernels& kernels = byte_kernels_of(isa);
  const std::int64_t item = std::clamp<std::int64_t>(kItemBytes / weights.row_bytes, 1, weights.outputs);
  const std::int64_t items = (weights.outputs + item - 1) / item;
  const bool small = weights.outputs * weights.row_bytes < kSmallBytes;
  Activations activations;
  for (std::int64_t first = 0; first < rows; first += kBlockRows) {
    const ByteActivations bytes =
        activations.quantise(kernels, x + first * weights.inputs, std::min(kBlockRows, rows - first), weights.inputs);
    parallel_for(items, small ? 1 : threads, [&](std::int64_t i, int) {
      BlockRows part = weights;
      part.blocks += i * item * weights.row_bytes;
      part.outputs = std::min(item, weights.outputs - i * item);
      kernels.multiply_blocks(part, bytes, y + first * weights.outputs + i * item, weights.outputs);
    });
  }
}

void widen_blocks(GgmlType type, const std::byte* blocks, std::int64_t numbers, float* out, Isa isa) {
  byte_kernels_of(isa).widen_blocks(type, blocks, numbers, out);
}

}  // namespace tessera::kernels
