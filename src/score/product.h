// The one matrix product of the scorers: query rows times key rows.
#pragma once

#include <cstdint>

namespace tessera::score {

/// out[i][j] = scale * sum_d a[i][d] * b[j][d] for i < rows, j < columns; leading dimensions count floats.
/// Runs on the calling thread alone, so that results depend on neither the thread count nor the calling context:
/// scorers call it from the body of parallel_for on chunks of fixed size.
void multiply_transposed(const float* a, std::int64_t rows, std::int64_t a_stride, const float* b, std::int64_t columns,
                         std::int64_t b_stride, std::int64_t depth, float scale, float* out, std::int64_t out_stride);

/// out[i][j] = sum_d a[i][d] * b[d][j]; otherwise as above.
void multiply(const float* a, std::int64_t rows, std::int64_t a_stride, const float* b, std::int64_t columns,
              std::int64_t b_stride, std::int64_t depth, float* out, std::int64_t out_stride);

}  // namespace tessera::score
