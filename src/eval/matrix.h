// The two small dense matrix operations of the generators and the sampled evaluation.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "eval/random.h"

namespace tessera::eval {

/// out[r, c] = sum_k x[r, k] * w[k, c]. x is [rows, inner], w [inner, columns], row-major; out has row stride
/// `out_stride`. One thread, fixed order of summation.
void multiply_rows(const float* x, std::int64_t rows, std::int64_t inner, const float* w, std::int64_t columns,
                   float* out, std::int64_t out_stride);

/// Random orthogonal [size, size] matrix: Gram-Schmidt of a Gaussian one.
std::vector<float> random_orthogonal(std::int64_t size, Random random);

}  // namespace tessera::eval
