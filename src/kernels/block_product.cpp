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

/// What the products read of activations; nothing else is written.
struct ActivationForms {
  bool bytes = false;
  bool paired = false;
  bool quartered = false;
  bool sums = false;
};

ActivationForms forms_of(std::span<const BlockProduct> products, std::int64_t rows) {
  ActivationForms forms;
  for (const BlockProduct& product : products) {
    switch (product.weights.type) {
      case GgmlType::q4_k:
      case GgmlType::q5_k:
        (rows == 1 ? forms.paired : forms.bytes) = true;
        break;
      case GgmlType::q4_0:
      case GgmlType::q4_1:
      case GgmlType::q5_0:
      case GgmlType::q5_1:
        (rows == 1 ? forms.quartered : forms.bytes) = true;
        break;
      case GgmlType::q8_0:
        forms.bytes = true;
        break;
      default:  // scales of 16 numbers
        forms.bytes = forms.sums = true;
    }
  }
  return forms;
}

/// Rows as ByteActivations, each array at the start of a cache line.
class Activations {
 public:
  Activations(const ByteKernels& kernels, const float* x, std::int64_t rows, std::int64_t inputs,
              const ActivationForms& forms) {
    const std::int64_t padded = (inputs + kBlockChunk - 1) / kBlockChunk * kBlockChunk;
    const std::int64_t groups = inputs / kActivationGroup;
    const std::int64_t padded_groups = padded / kActivationGroup;
    const std::int64_t arrangements = (forms.bytes ? 1 : 0) + (forms.paired ? 1 : 0) + (forms.quartered ? 1 : 0);
    const std::int64_t floats = (2 + (forms.sums ? 2 : 0) + (forms.paired ? 2 : 0)) * padded_groups;
    buffer_ = AlignedBuffer(static_cast<std::size_t>(rows * (arrangements * padded + floats * 4)));
    std::byte* free = buffer_.data();
    const auto take = [&]<class T>(T*& array, bool wanted, std::int64_t count) {
      array = wanted ? reinterpret_cast<T*>(free) : nullptr;
      if (wanted) free += rows * count * static_cast<std::int64_t>(sizeof(T));
    };
    std::int8_t* bytes = nullptr;
    std::int8_t* paired = nullptr;
    std::int8_t* quartered = nullptr;
    float* scales = nullptr;
    float* sums_of_groups = nullptr;
    float* sums = nullptr;
    float* group_weights = nullptr;
    take(bytes, forms.bytes, padded);
    take(paired, forms.paired, padded);
    take(quartered, forms.quartered, padded);
    take(scales, true, padded_groups);
    take(sums_of_groups, true, padded_groups);
    take(sums, forms.sums, 2 * padded_groups);
    take(group_weights, forms.paired, 2 * padded_groups);
    for (std::int64_t r = 0; r < rows; ++r) {
      // The row of an array, cleared behind the last number.
      const auto row_of = [&]<class T>(T* array, std::int64_t first, std::int64_t count) {
        T* row = array == nullptr ? nullptr : array + r * count;
        if (row != nullptr) std::fill(row + first, row + count, T{0});
        return row;
      };
      // The last numbers of an arrangement have places with zeros between them.
      const std::int64_t whole = inputs / 256 * 256;
      kernels.quantise_activations(x + r * inputs, inputs, row_of(bytes, inputs, padded), row_of(paired, whole, padded),
                                   row_of(quartered, whole, padded), row_of(scales, groups, padded_groups),
                                   row_of(sums, 2 * groups, 2 * padded_groups),
                                   row_of(sums_of_groups, groups, padded_groups),
                                   row_of(group_weights, groups / 8 * 16, 2 * padded_groups));
    }
    view_ = {rows, padded, bytes, paired, quartered, scales, sums, sums_of_groups, group_weights};
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
    const std::int64_t count = std::min(kBlockRows, rows - first);
    const ActivationForms forms = forms_of(products, count);
    std::vector<Progress> progress(static_cast<std::size_t>(team));
    // A thread rounds for itself and always has the same share, so that little of what threads write changes hands:
    // where cores share no cache, a line that does takes as long as 128 bytes of weights and more.
    parallel_for(team, team, [&](std::int64_t, int thread) {
      const Activations activations(kernels, x + first * inputs, count, inputs, forms);
      shares.work(thread, progress, [&](const Item& item) {
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
