#include "kernels/block_product.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "core/parallel.h"
#include "kernels/cpu/aligned_buffer.h"
#include "kernels/cpu/bytes.h"

namespace tessera::kernels {

namespace {

/// Bytes of weights that a thread takes at a time: long streams first, then ever shorter ones, so that all threads end
/// at the same time.
constexpr std::int64_t kLeastItemBytes = 1 << 14;
constexpr std::int64_t kMostItemBytes = 1 << 19;
/// Matrices below this are read before a second thread has started.
constexpr std::int64_t kSmallBytes = 1 << 16;

/// Rows as ByteActivations, each array at the start of a cache line.
class Activations {
 public:
  Activations(const ByteKernels& kernels, const float* x, std::int64_t rows, std::int64_t inputs) {
    const std::int64_t padded = (inputs + kBlockChunk - 1) / kBlockChunk * kBlockChunk;
    // Three bytes and, in floats, two numbers of a group of 32 and one of 16 for every activation.
    buffer_ = AlignedBuffer(static_cast<std::size_t>(rows * padded / 2 * 7));
    auto* bytes = reinterpret_cast<std::int8_t*>(buffer_.data());
    std::int8_t* paired = bytes + rows * padded;
    std::int8_t* quartered = paired + rows * padded;
    auto* scales = reinterpret_cast<float*>(quartered + rows * padded);
    float* sums_of_groups = scales + rows * padded / kActivationGroup;
    float* sums = sums_of_groups + rows * padded / kActivationGroup;
    const std::int64_t groups = inputs / kActivationGroup;
    const std::int64_t padded_groups = padded / kActivationGroup;
    for (std::int64_t r = 0; r < rows; ++r) {
      const auto clear = [&](auto* row, std::int64_t first, std::int64_t last) {
        std::fill(row + first, row + last, 0);
      };
      std::int8_t* own = bytes + r * padded;
      std::int8_t* own_paired = paired + r * padded;
      std::int8_t* own_quartered = quartered + r * padded;
      float* own_scales = scales + r * padded_groups;
      float* own_sums = sums + r * padded_groups * 2;
      float* own_sums_of_groups = sums_of_groups + r * padded_groups;
      clear(own, inputs, padded);
      // The last numbers have places with zeros between them.
      clear(own_paired, inputs / 256 * 256, padded);
      clear(own_quartered, inputs / 256 * 256, padded);
      clear(own_scales, groups, padded_groups);
      clear(own_sums, 2 * groups, 2 * padded_groups);
      clear(own_sums_of_groups, groups, padded_groups);
      kernels.quantise_activations(x + r * inputs, inputs, own, own_paired, own_quartered, own_scales, own_sums,
                                   own_sums_of_groups);
    }
    view_ = {rows, padded, bytes, paired, quartered, scales, sums, sums_of_groups};
  }
  const ByteActivations& view() const { return view_; }

 private:
  AlignedBuffer buffer_;
  ByteActivations view_{};
};

/// Rows of one of the products.
struct Item {
  const BlockProduct* product;
  std::int64_t first;
  std::int64_t outputs;
};

/// Items of a share that threads have taken.
struct alignas(64) Progress {
  std::atomic<std::int64_t> taken{0};
};

/// The rows of all products in as many shares of the same size as there are threads. What a thread asks memory for
/// beyond an item is the next item of its share: only the end of a share is asked for in vain.
class Shares {
 public:
  Shares(std::span<const BlockProduct> products, std::int64_t bytes, int team) {
    ends_.reserve(static_cast<std::size_t>(team));
    const std::int64_t share = bytes / team;
    std::int64_t left = share;  // of the share
    for (const BlockProduct& product : products) {
      const auto& [type, blocks, row_bytes, outputs, inputs] = product.weights;
      for (std::int64_t first = 0; first < outputs;) {
        const std::int64_t item_bytes = std::clamp(left / 2, kLeastItemBytes, kMostItemBytes);
        const std::int64_t count = std::min(std::max<std::int64_t>(item_bytes / row_bytes, 1), outputs - first);
        items_.push_back({&product, first, count});
        first += count;
        left -= count * row_bytes;
        if (left <= 0 && std::ssize(ends_) + 1 < team) {
          ends_.push_back(std::ssize(items_));
          left += share;
        }
      }
    }
    ends_.resize(static_cast<std::size_t>(team), std::ssize(items_));
  }

  /// Calls body(item) for the items of share `own`, in order, and then for what is left of the others'.
  template <class Body>
  void work(std::int64_t own, std::span<Progress> progress, const Body& body) const {
    for (std::size_t i = 0; i < ends_.size(); ++i) {
      const std::size_t share = (static_cast<std::size_t>(own) + i) % ends_.size();
      const std::int64_t begin = share == 0 ? 0 : ends_[share - 1];
      for (;;) {
        const std::int64_t item = begin + progress[share].taken.fetch_add(1, std::memory_order_relaxed);
        if (item >= ends_[share]) break;
        body(items_[static_cast<std::size_t>(item)]);
      }
    }
  }

 private:
  std::vector<Item> items_;
  std::vector<std::int64_t> ends_;  ///< of the items of each share
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
  const int team = bytes < kSmallBytes ? 1 : thread_count(threads);
  const Shares shares(products, bytes, team);
  for (std::int64_t first = 0; first < rows; first += kBlockRows) {
    const Activations activations(kernels, x + first * inputs, std::min(kBlockRows, rows - first), inputs);
    std::vector<Progress> progress(static_cast<std::size_t>(team));
    parallel_for(team, team, [&](std::int64_t own, int) {
      shares.work(own, progress, [&](const Item& item) {
        BlockRows part = item.product->weights;
        part.blocks += item.first * part.row_bytes;
        part.outputs = item.outputs;
        const std::int64_t stride = item.product->weights.outputs;
        kernels.multiply_blocks(part, activations.view(), item.product->y + first * stride + item.first, stride);
      });
    });
  }
}

void widen_blocks(GgmlType type, const std::byte* blocks, std::int64_t numbers, float* out, Isa isa) {
  byte_kernels_of(isa).widen_blocks(type, blocks, numbers, out);
}

}  // namespace tessera::kernels
