#include "model/block_matrix.h"

#include <algorithm>
#include <cassert>

#include "core/parallel.h"
#include "model/layers/linear.h"
#include "score/product.h"

namespace tessera::model {

namespace {

/// Rows of the activations per product.
constexpr std::int64_t kTileRows = 128;
/// Rows of the weights that are widened at a time: few enough that they stay in the second-level cache.
constexpr std::int64_t kPanel = 128;

}  // namespace

BlockMatrix::BlockMatrix(std::span<const std::byte> blocks, GgmlType type, std::int64_t outputs, std::int64_t inputs)
    : Matrix(outputs, inputs), blocks_(blocks.data()), type_(type), row_bytes_(bytes_of(type, inputs)) {
  assert(inputs % block_of(type).numbers == 0);
  assert(static_cast<std::int64_t>(blocks.size()) == outputs * row_bytes_);
}

void BlockMatrix::widen(std::int64_t first, std::int64_t count, float* out) const {
  dequantise(type_, blocks_ + first * row_bytes_, count * inputs(), out);
}

void BlockMatrix::row(std::int64_t output, float* out) const {
  widen(output, 1, out);
}

void BlockMatrix::multiply(const float* x, std::int64_t rows, float* y, const ProductOptions& options) const {
  const std::int64_t panels = (outputs() + kPanel - 1) / kPanel;
  const int team = panels > 1 ? thread_count(options.threads) : 1;
  std::vector<std::vector<float>> storage(static_cast<std::size_t>(team));
  parallel_for(panels, team, [&](std::int64_t panel, int thread) {
    const std::int64_t column = panel * kPanel;
    const std::int64_t columns = std::min(kPanel, outputs() - column);
    std::vector<float>& weights = storage[static_cast<std::size_t>(thread)];
    weights.resize(static_cast<std::size_t>(kPanel * inputs()));
    widen(column, columns, weights.data());
    for (std::int64_t row = 0; row < rows; row += kTileRows) {
      score::multiply_transposed(x + row * inputs(), std::min(kTileRows, rows - row), inputs(), weights.data(), columns,
                                 inputs(), inputs(), 1.0F, y + row * outputs() + column, outputs());
    }
  });
}

void BlockMatrix::multiply_back(const float* d_y, std::int64_t rows, float* d_x, int threads) const {
  std::vector<float> weights(static_cast<std::size_t>(outputs() * inputs()));
  widen(0, outputs(), weights.data());
  linear_backward(weights, inputs(), outputs(), d_y, rows, d_x, threads);
}

}  // namespace tessera::model
