#include "kernels/block_product.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "core/parallel.h"
#include "kernels/cpu/aligned_buffer.h"
#include "kernels/cpu/bytes.h"

namespace tessera::kernels {

namespace {

/// Bytes of weights that a thread takes at a time: much more than the start of a stream costs, and a small part of what
/// all threads do.
constexpr std::int64_t kLeastItemBytes = 1 << 16;
constexpr std::int64_t kMostItemBytes = 1 << 19;
constexpr std::int64_t kItemsWanted = 32;
/// Matrices below this are read before a second thread has started.
constexpr std::int64_t kSmallBytes = 1 << 16;

/// Rows as ByteActivations, each array at the start of a cache line.
class Activations {
 public:
  Activations(const ByteKernels& kernels, const float* x, std::int64_t rows, std::int64_t inputs) {
    const std::int64_t padded = (inputs + kBlockChunk - 1) / kBlockChunk * kBlockChunk;
    // Two bytes and, in floats, two numbers of a group of 32 and one of 16 for every activation.
    buffer_ = AlignedBuffer(static_cast<std::size_t>(rows * padded / 2 * 5));
    std::memset(buffer_.data(), 0, buffer_.bytes());
    auto* bytes = reinterpret_cast<std::int8_t*>(buffer_.data());
    std::int8_t* paired = bytes + rows * padded;
    auto* scales = reinterpret_cast<float*>(paired + rows * padded);
    float* sums_of_groups = scales + rows * padded / kActivationGroup;
    float* sums = sums_of_groups + rows * padded / kActivationGroup;
    for (std::int64_t r = 0; r < rows; ++r) {
      kernels.quantise_activations(x + r * inputs, inputs, bytes + r * padded, paired + r * padded,
                                   scales + r * padded / kActivationGroup, sums + r * padded / 16,
                                   sums_of_groups + r * padded / kActivationGroup);
    }
    view_ = {rows, padded, bytes, paired, scales, sums, sums_of_groups};
  }
  const ByteActivations& view() const { return view_; }

 private:
  AlignedBuffer buffer_;
  ByteActivations view_{};
};

}  // namespace

void multiply_blocks(const BlockRows& weights, const float* x, std::int64_t rows, float* y, int threads, Isa isa) {
  const BlockProduct product{weights, y};
  multiply_blocks(std::span(&product, 1), x, rows, threads, isa);
}

void multiply_blocks(std::span<const BlockProduct> products, const float* x, std::int64_t rows, int threads, Isa isa) {
  if (products.empty()) return;
  const ByteKernels& kernels = byte_kernels_of(isa);
  const std::int64_t inputs = products.front().weights.inputs;
  std::int64_t bytes = 0;
  for (const BlockProduct& product : products) bytes += product.weights.outputs * product.weights.row_bytes;
  const std::int64_t item_bytes = std::clamp(bytes / kItemsWanted, kLeastItemBytes, kMostItemBytes);
  struct Item {
    const BlockProduct* product;
    std::int64_t first;
    std::int64_t outputs;
  };
  std::vector<Item> items;
  for (const BlockProduct& product : products) {
    const std::int64_t outputs = product.weights.outputs;
    const std::int64_t most = std::max<std::int64_t>(item_bytes / product.weights.row_bytes, 1);
    for (std::int64_t first = 0; first < outputs; first += most) {
      items.push_back({&product, first, std::min(most, outputs - first)});
    }
  }
  for (std::int64_t first = 0; first < rows; first += kBlockRows) {
    const Activations activations(kernels, x + first * inputs, std::min(kBlockRows, rows - first), inputs);
    parallel_for(std::ssize(items), bytes < kSmallBytes ? 1 : threads, [&](std::int64_t i, int) {
      const auto& [product, output, outputs] = items[static_cast<std::size_t>(i)];
      BlockRows part = product->weights;
      part.blocks += output * part.row_bytes;
      part.outputs = outputs;
      const std::int64_t stride = product->weights.outputs;
      kernels.multiply_blocks(part, activations.view(), product->y + first * stride + output, stride);
    });
  }
}

void widen_blocks(GgmlType type, const std::byte* blocks, std::int64_t numbers, float* out, Isa isa) {
  byte_kernels_of(isa).widen_blocks(type, blocks, numbers, out);
}

}  // namespace tessera::kernels
