#include "model/block_matrix.h"

#include <algorithm>
#include <cassert>

#include "core/parallel.h"
#include "kernels/block_product.h"
#include "model/layers/linear.h"
#include "model/products.h"

namespace tessera::model {

BlockMatrix::BlockMatrix(std::span<const std::byte> blocks, GgmlType type, std::int64_t outputs, std::int64_t inputs)
    : Matrix(outputs, inputs), rows_{type, blocks.data(), bytes_of(type, inputs), outputs, inputs} {
  assert(inputs % block_of(type).numbers == 0);
  assert(static_cast<std::int64_t>(blocks.size()) == outputs * rows_.row_bytes);
}

void BlockMatrix::row(std::int64_t output, float* out) const {
  dequantise(rows_.type, rows_.blocks + output * rows_.row_bytes, inputs(), out);
}

void BlockMatrix::multiply(const float* x, std::int64_t rows, float* y, const ProductOptions& options) const {
  if (rows <= kernels::kBlockRows && !options.exact) {
    kernels::multiply_blocks(rows_, x, rows, y, options.threads, options.isa.value_or(default_isa()));
  } else {
    multiply_widened(x, rows, y, options);
  }
}

void BlockMatrix::multiply_widened(const float* x, std::int64_t rows, float* y, const ProductOptions& options) const {
  const Isa isa = options.isa.value_or(default_isa());
  const ProductLevel& level = products_of(isa);
  const bool pairs = !options.exact && level.round_pairs != nullptr;
  const std::int64_t words = pairs ? inputs() / 2 : inputs();  // blocks are even
  ProductScratch own;
  ProductScratch& scratch = options.scratch == nullptr ? own : *options.scratch;
  const auto grow = [](std::vector<std::uint32_t>& buffer, std::int64_t size) {
    if (std::ssize(buffer) < size) buffer.resize(static_cast<std::size_t>(size));
  };
  const auto* activations = reinterpret_cast<const std::uint32_t*>(x);
  if (pairs) {
    grow(scratch.rows, rows * words);
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
  // Per thread: what the product packs, the panel of weights, and one row of floats.
  const std::int64_t product_room = (kPanelOutputs + 16) * kPanelWords;
  const std::int64_t room = product_room + kPanelOutputs * words + (pairs ? inputs() : 0);
  grow(scratch.panels, team * room);
  parallel_for(panels, team, [&](std::int64_t panel, int thread) {
    const std::int64_t first = panel * kPanelOutputs;
    const std::int64_t count = std::min(kPanelOutputs, outputs() - first);
    std::uint32_t* packed = scratch.panels.data() + thread * room;
    std::uint32_t* weights = packed + product_room;
    auto* floats = reinterpret_cast<float*>(weights + (pairs ? kPanelOutputs * words : 0));
    if (pairs) {
      for (std::int64_t output = 0; output < count; ++output) {
        kernels::widen_blocks(rows_.type, rows_.blocks + (first + output) * rows_.row_bytes, inputs(), floats, isa);
        level.round_pairs(floats, inputs(), reinterpret_cast<std::uint16_t*>(weights + output * words), words);
      }
    } else {
      kernels::widen_blocks(rows_.type, rows_.blocks + first * rows_.row_bytes, count * inputs(), floats, isa);
    }
    level.panel({.weights = reinterpret_cast<const std::byte*>(weights),
                 .dtype = pairs ? DType::bf16 : DType::f32,
                 .inputs = inputs(),
                 .outputs = count,
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

void BlockMatrix::multiply_back(const float* d_y, std::int64_t rows, float* d_x, int threads) const {
  std::vector<float> weights(static_cast<std::size_t>(outputs() * inputs()));
  dequantise(rows_.type, rows_.blocks, outputs() * inputs(), weights.data());
  linear_backward(weights, inputs(), outputs(), d_y, rows, d_x, threads);
}

}  // namespace tessera::model
