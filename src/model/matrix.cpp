#include "model/matrix.h"

#include <algorithm>

#include "core/convert.h"
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

DenseMatrix::DenseMatrix(std::span<const std::byte> bytes, DType dtype, std::int64_t outputs, std::int64_t inputs)
    : Matrix(outputs, inputs), data_(bytes.data()), dtype_(dtype) {
  if (reinterpret_cast<std::uintptr_t>(bytes.data()) % size_of(dtype) == 0) return;
  copy_.assign(bytes.begin(), bytes.end());
  data_ = copy_.data();
}

const float* DenseMatrix::rows_as_float(std::int64_t first, std::int64_t count, std::vector<float>& storage) const {
  const std::byte* begin = data_ + first * inputs() * static_cast<std::int64_t>(size_of(dtype_));
  if (dtype_ == DType::f32) return reinterpret_cast<const float*>(begin);
  if (std::ssize(storage) < count * inputs()) storage.resize(static_cast<std::size_t>(count * inputs()));
  to_float(begin, dtype_, count * inputs(), storage.data());
  return storage.data();
}

void DenseMatrix::row(std::int64_t output, float* out) const {
  to_float(data_ + output * inputs() * static_cast<std::int64_t>(size_of(dtype_)), dtype_, inputs(), out);
}

void DenseMatrix::multiply(const float* x, std::int64_t rows, float* y, const ProductOptions& options) const {
  if (dtype_ == DType::f32) {
    linear({reinterpret_cast<const float*>(data_), static_cast<std::size_t>(outputs() * inputs())}, inputs(), outputs(),
           x, rows, y, options.threads);
    return;
  }
  const std::int64_t panels = (outputs() + kPanel - 1) / kPanel;
  const int team = panels > 1 ? thread_count(options.threads) : 1;
  std::vector<std::vector<float>> storage(static_cast<std::size_t>(team));
  parallel_for(panels, team, [&](std::int64_t panel, int thread) {
    const std::int64_t column = panel * kPanel;
    const std::int64_t columns = std::min(kPanel, outputs() - column);
    const float* weights = rows_as_float(column, columns, storage[static_cast<std::size_t>(thread)]);
    for (std::int64_t row = 0; row < rows; row += kTileRows) {
      score::multiply_transposed(x + row * inputs(), std::min(kTileRows, rows - row), inputs(), weights, columns,
                                 inputs(), inputs(), 1.0F, y + row * outputs() + column, outputs());
    }
  });
}

void DenseMatrix::multiply_back(const float* d_y, std::int64_t rows, float* d_x, int threads) const {
  std::vector<float> storage;
  const float* weights = rows_as_float(0, outputs(), storage);
  linear_backward({weights, static_cast<std::size_t>(outputs() * inputs())}, inputs(), outputs(), d_y, rows, d_x,
                  threads);
}

}  // namespace tessera::model
