#include "model/matrix.h"

#include <algorithm>

#include "core/convert.h"
#include "core/parallel.h"
#include "kernels/block_product.h"
#include "model/layers/linear.h"
#include "model/products.h"

namespace tessera::model {

namespace {

/// Up to so many rows are multiplied with weights as they stream by; beyond, packing the weights pays.
constexpr std::int64_t kFewRows = 12;
/// Outputs that a thread takes at a time where weights stream by.
constexpr std::int64_t kStreamed = 128;

}  // namespace

void multiply_together(std::span<const MatrixProduct> products, const float* x, std::int64_t rows,
                       const ProductOptions& options) {
  std::vector<kernels::BlockProduct> blocks;
  if (rows <= kernels::kBlockRows && !options.exact) {
    for (const auto& [matrix, y] : products) {
      if (const kernels::BlockRows* weights = matrix->blocks()) blocks.push_back({*weights, y});
    }
  }
  if (blocks.size() == products.size()) {
    kernels::multiply_blocks(blocks, x, rows, options.threads, options.isa.value_or(default_isa()));
  } else {
    for (const auto& [matrix, y] : products) matrix->multiply(x, rows, y, options);
  }
}

DenseMatrix::DenseMatrix(std::span<const std::byte> bytes, DType dtype, std::int64_t outputs, std::int64_t inputs)
    : Matrix(outputs, inputs), data_(bytes.data()), dtype_(dtype) {
  if (reinterpret_cast<std::uintptr_t>(bytes.data()) % size_of(dtype) == 0) return;
  copy_.assign(bytes.begin(), bytes.end());
  data_ = copy_.data();
}

const std::byte* DenseMatrix::row_bytes(std::int64_t output) const {
  return data_ + output * inputs() * static_cast<std::int64_t>(size_of(dtype_));
}

void DenseMatrix::row(std::int64_t output, float* out) const {
  to_float(row_bytes(output), dtype_, inputs(), out);
}

void DenseMatrix::multiply(const float* x, std::int64_t rows, float* y, const ProductOptions& options) const {
  const ProductLevel& level = products_of(options.isa.value_or(default_isa()));
  if (rows <= kFewRows) {
    stream(level, x, rows, y, options.threads);
  } else if (dtype_ == DType::f32) {
    linear({reinterpret_cast<const float*>(data_), static_cast<std::size_t>(outputs() * inputs())}, inputs(), outputs(),
           x, rows, y, options.threads);
  } else {
    pack(level, x, rows, y, options);
  }
}

void DenseMatrix::stream(const ProductLevel& level, const float* x, std::int64_t rows, float* y, int threads) const {
  const std::int64_t pieces = (outputs() + kStreamed - 1) / kStreamed;
  // A parallel region costs microseconds, and a scheduling quantum when the machine is busy.
  const bool small = outputs() * inputs() < 1 << 16;
  parallel_for(pieces, small ? 1 : threads, [&](std::int64_t piece, int) {
    const std::int64_t first = piece * kStreamed;
    const std::int64_t count = std::min(kStreamed, outputs() - first);
    for (std::int64_t row = 0; row < rows; row += kDotRows) {
      level.dots(row_bytes(first), dtype_, inputs(), count, x + row * inputs(), std::min(kDotRows, rows - row),
                 y + row * outputs() + first, outputs());
    }
  });
}

void DenseMatrix::pack(const ProductLevel& level, const float* x, std::int64_t rows, float* y,
                       const ProductOptions& options) const {
  ProductScratch own;
  ProductScratch& scratch = options.scratch == nullptr ? own : *options.scratch;
  const bool pairs = dtype_ == DType::bf16 && !options.exact && level.round_pairs != nullptr;
  const std::int64_t words = pairs ? (inputs() + 1) / 2 : inputs();
  const auto* activations = reinterpret_cast<const std::uint32_t*>(x);
  if (pairs) {
    if (std::ssize(scratch.rows) < rows * words) scratch.rows.resize(static_cast<std::size_t>(rows * words));
    constexpr std::int64_t together = 16;
    parallel_for((rows + together - 1) / together, options.threads, [&](std::int64_t item, int) {
      for (std::int64_t row = item * together; row < std::min(rows, (item + 1) * together); ++row) {
        level.round_pairs(x + row * inputs(), inputs(),
                          reinterpret_cast<std::uint16_t*>(scratch.rows.data() + row * words), words);
      }
    });
    activations = scratch.rows.data();
  }
  const std::int64_t panels = (outputs() + kPanelOutputs - 1) / kPanelOutputs;
  const int team = panels > 1 ? thread_count(options.threads) : 1;
  const std::int64_t room = (kPanelOutputs + 16) * kPanelWords;
  if (std::ssize(scratch.panels) < team * room) scratch.panels.resize(static_cast<std::size_t>(team * room));
  parallel_for(panels, team, [&](std::int64_t panel, int thread) {
    const std::int64_t first = panel * kPanelOutputs;
    std::uint32_t* packed = scratch.panels.data() + thread * room;
    level.panel({.weights = row_bytes(first),
                 .dtype = dtype_,
                 .inputs = inputs(),
                 .outputs = std::min(kPanelOutputs, outputs() - first),
                 .x = activations,
                 .pairs = pairs,
                 .words = words,
                 .rows = rows,
                 .y = y + first,
                 .y_stride = outputs(),
                 .packed = packed,
                 .widened = packed + kPanelOutputs * kPanelWords});
  });
}

void DenseMatrix::multiply_back(const float* d_y, std::int64_t rows, float* d_x, int threads) const {
  std::vector<float> storage;
  const auto elements = static_cast<std::size_t>(outputs() * inputs());
  std::span<const float> weights(reinterpret_cast<const float*>(data_), elements);
  if (dtype_ != DType::f32) {
    storage.resize(elements);
    to_float(data_, dtype_, outputs() * inputs(), storage.data());
    weights = storage;
  }
  linear_backward(weights, inputs(), outputs(), d_y, rows, d_x, threads);
}

}  // namespace tessera::model
