#include "recurrent/operators.h"

#include <algorithm>
#include <cmath>

namespace tessera::recurrent {

float sigmoid(float x) {
  return 1.0F / (1.0F + std::exp(-x));
}

float silu(float x) {
  return x * sigmoid(x);
}

float softplus(float x) {
  return std::max(x, 0.0F) + std::log1p(std::exp(-std::abs(x)));
}

void short_convolution(const float* x, std::int64_t tokens, std::int64_t dim, std::span<const float> weights,
                       std::span<float> tail, float* y) {
  const auto width = static_cast<std::int64_t>(weights.size()) / dim;
  const std::int64_t history = width - 1;
  // The tail and then x, as one run of rows; y may overwrite x.
  std::vector<float> rows(tail.begin(), tail.end());
  rows.insert(rows.end(), x, x + tokens * dim);
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t c = 0; c < dim; ++c) {
      float sum = 0;
      for (std::int64_t m = 0; m < width; ++m) sum += weights[m * dim + c] * rows[(t + m) * dim + c];
      y[t * dim + c] = silu(sum);
    }
  }
  std::copy_n(rows.end() - history * dim, history * dim, tail.begin());
}

float softplus_decay(float a, float bias, float a_log) {
  return -std::exp(a_log) * softplus(a + bias);
}

float bounded_decay(float a, float bias, float a_log, float lower_bound) {
  return lower_bound * sigmoid(std::exp(a_log) * (a + bias));
}

std::vector<float> alibi_slopes(std::int64_t heads) {
  std::int64_t power = 1;
  while (2 * power <= heads) power *= 2;
  const auto slope = [](std::int64_t place, std::int64_t of) {
    return static_cast<float>(std::exp2(-8.0 * static_cast<double>(place + 1) / static_cast<double>(of)));
  };
  std::vector<float> slopes;
  for (std::int64_t h = 0; h < power; ++h) slopes.push_back(slope(h, power));
  for (std::int64_t h = 0; static_cast<std::int64_t>(slopes.size()) < heads; h += 2) {
    slopes.push_back(slope(h, 2 * power));
  }
  return slopes;
}

void rms_normalise(std::span<float> row, float epsilon) {
  double squares = 0;
  for (const float x : row) squares += static_cast<double>(x) * x;
  const auto factor = static_cast<float>(1 / std::sqrt(squares / static_cast<double>(row.size()) + epsilon));
  for (float& x : row) x *= factor;
}

}  // namespace tessera::recurrent
