// Projections: rows of activations times a weight matrix.
#pragma once

#include <cstdint>
#include <span>

namespace tessera::model {

/// y[r][o] = sum_i x[r][i] * weight[o][i] for `rows` rows; weight is [outputs][inputs], x and y are contiguous.
///
/// oneDNN's float32 product on tiles of fixed size, one thread each: it reads [outputs][inputs] as it lies in the file,
/// and results do not depend on the number of threads.
void linear(std::span<const float> weight, std::int64_t inputs, std::int64_t outputs, const float* x, std::int64_t rows,
            float* y, int threads);

/// The gradient of x: d_x[r][i] = sum_o d_y[r][o] * weight[o][i].
void linear_backward(std::span<const float> weight, std::int64_t inputs, std::int64_t outputs, const float* d_y,
                     std::int64_t rows, float* d_x, int threads);

}  // namespace tessera::model
