#include "eval/matrix.h"

#include <algorithm>
#include <cmath>

namespace tessera::eval {
namespace {

constexpr std::int64_t kRegisterRows = 4;
constexpr std::int64_t kRegisterColumns = 8;

/// One register block; the fixed bounds let the compiler keep the sums in registers.
void multiply_block(const float* x, std::int64_t inner, const float* w, std::int64_t columns, float* out,
                    std::int64_t out_stride) {
  float sums[kRegisterRows][kRegisterColumns] = {};
  for (std::int64_t k = 0; k < inner; ++k) {
    const float* w_row = w + k * columns;
    for (std::int64_t r = 0; r < kRegisterRows; ++r) {
      const float value = x[r * inner + k];
      for (std::int64_t c = 0; c < kRegisterColumns; ++c) sums[r][c] += value * w_row[c];
    }
  }
  for (std::int64_t r = 0; r < kRegisterRows; ++r) std::copy_n(sums[r], kRegisterColumns, out + r * out_stride);
}

void multiply_edge(const float* x, std::int64_t rows, std::int64_t inner, const float* w, std::int64_t columns,
                   std::int64_t first_column, std::int64_t last_column, float* out, std::int64_t out_stride) {
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = first_column; c < last_column; ++c) {
      float sum = 0;
      for (std::int64_t k = 0; k < inner; ++k) sum += x[r * inner + k] * w[k * columns + c];
      out[r * out_stride + c] = sum;
    }
  }
}

}  // namespace

void multiply_rows(const float* x, std::int64_t rows, std::int64_t inner, const float* w, std::int64_t columns,
                   float* out, std::int64_t out_stride) {
  const std::int64_t whole_columns = columns - columns % kRegisterColumns;
  std::int64_t r = 0;
  for (; r + kRegisterRows <= rows; r += kRegisterRows) {
    const float* x_rows = x + r * inner;
    float* out_rows = out + r * out_stride;
    for (std::int64_t c = 0; c < whole_columns; c += kRegisterColumns) {
      multiply_block(x_rows, inner, w + c, columns, out_rows + c, out_stride);
    }
    multiply_edge(x_rows, kRegisterRows, inner, w, columns, whole_columns, columns, out_rows, out_stride);
  }
  multiply_edge(x + r * inner, rows - r, inner, w, columns, 0, columns, out + r * out_stride, out_stride);
}

std::vector<float> random_orthogonal(std::int64_t size, Random random) {
  std::vector<double> rows(size * size);
  for (std::int64_t r = 0; r < size; ++r) {
    double* row = rows.data() + r * size;
    for (std::int64_t c = 0; c < size; ++c) row[c] = random.normal();
    // Twice is enough: the second pass removes what rounding left of the first.
    for (int pass = 0; pass < 2; ++pass) {
      for (std::int64_t other = 0; other < r; ++other) {
        const double* basis = rows.data() + other * size;
        double dot = 0;
        for (std::int64_t c = 0; c < size; ++c) dot += row[c] * basis[c];
        for (std::int64_t c = 0; c < size; ++c) row[c] -= dot * basis[c];
      }
    }
    double norm = 0;
    for (std::int64_t c = 0; c < size; ++c) norm += row[c] * row[c];
    norm = std::sqrt(norm);
    for (std::int64_t c = 0; c < size; ++c) row[c] /= norm;
  }
  return {rows.begin(), rows.end()};
}

}  // namespace tessera::eval
