#include "model/layers/linear.h"

#include <algorithm>
#include <cassert>

#include "core/parallel.h"
#include "score/product.h"

namespace tessera::model {

void linear(std::span<const float> weight, std::int64_t inputs, std::int64_t outputs, const float* x, std::int64_t rows,
            float* y, int threads) {
  assert(static_cast<std::int64_t>(weight.size()) == inputs * outputs);
  // 128 rows repay the packing of the weights inside the product; one row is bound by memory and wants small panels.
  constexpr std::int64_t tile_rows = 128;
  const std::int64_t panel = rows == 1 ? 128 : 512;
  const std::int64_t panels = (outputs + panel - 1) / panel;
  const std::int64_t slices = (rows + tile_rows - 1) / tile_rows;
  // A parallel region costs microseconds, and a scheduling quantum when the machine is busy: not for products that one
  // thread finishes in a few tens of microseconds.
  const bool small = static_cast<double>(rows) * static_cast<double>(inputs) * static_cast<double>(outputs) < 1 << 19;
  parallel_for(panels * slices, small ? 1 : threads, [&](std::int64_t i, int) {
    const std::int64_t row = i / panels * tile_rows;
    const std::int64_t column = i % panels * panel;
    score::multiply_transposed(x + row * inputs, std::min(tile_rows, rows - row), inputs,
                               weight.data() + column * inputs, std::min(panel, outputs - column), inputs, inputs, 1.0F,
                               y + row * outputs + column, outputs);
  });
}

void linear_backward(std::span<const float> weight, std::int64_t inputs, std::int64_t outputs, const float* d_y,
                     std::int64_t rows, float* d_x, int threads) {
  assert(static_cast<std::int64_t>(weight.size()) == inputs * outputs);
  constexpr std::int64_t tile_rows = 128;
  constexpr std::int64_t panel = 512;
  const std::int64_t panels = (inputs + panel - 1) / panel;
  const std::int64_t slices = (rows + tile_rows - 1) / tile_rows;
  parallel_for(panels * slices, threads, [&](std::int64_t i, int) {
    const std::int64_t row = i / panels * tile_rows;
    const std::int64_t column = i % panels * panel;
    score::multiply(d_y + row * outputs, std::min(tile_rows, rows - row), outputs, weight.data() + column,
                    std::min(panel, inputs - column), inputs, outputs, d_x + row * inputs + column, inputs);
  });
}

}  // namespace tessera::model
