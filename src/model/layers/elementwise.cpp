#include "model/layers/elementwise.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "core/parallel.h"
#include "model/products.h"

namespace tessera::model {

namespace {

constexpr std::int64_t kRowsPerItem = 32;

/// body(row) for every row, 32 rows at a time; a few rows stay on the calling thread.
template <class Body>
void for_rows(std::int64_t rows, int threads, const Body& body) {
  const std::int64_t items = (rows + kRowsPerItem - 1) / kRowsPerItem;
  parallel_for(items, threads, [&](std::int64_t item, int) {
    const std::int64_t end = std::min(rows, (item + 1) * kRowsPerItem);
    for (std::int64_t row = item * kRowsPerItem; row < end; ++row) body(row);
  });
}

}  // namespace

void rms_norm(const float* x, std::int64_t rows, std::span<const float> gain, double epsilon, float* out, int threads) {
  const auto width = static_cast<std::int64_t>(gain.size());
  for_rows(rows, threads, [&](std::int64_t row) {
    const float* in = x + row * width;
    float* to = out + row * width;
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (std::int64_t i = 0; i < width; ++i) squares += in[i] * in[i];
    const auto factor =
        static_cast<float>(1.0 / std::sqrt(static_cast<double>(squares) / static_cast<double>(width) + epsilon));
#pragma omp simd
    for (std::int64_t i = 0; i < width; ++i) to[i] = in[i] * factor * gain[static_cast<std::size_t>(i)];
  });
}

void rms_norm_backward(const float* x, std::int64_t rows, std::span<const float> gain, double epsilon,
                       const float* d_out, float* d_x, int threads) {
  const auto width = static_cast<std::int64_t>(gain.size());
  for_rows(rows, threads, [&](std::int64_t row) {
    const float* in = x + row * width;
    const float* d = d_out + row * width;
    float* to = d_x + row * width;
    double squares = 0;
    double product = 0;
    for (std::int64_t i = 0; i < width; ++i) {
      squares += static_cast<double>(in[i]) * in[i];
      product += static_cast<double>(in[i]) * gain[static_cast<std::size_t>(i)] * d[i];
    }
    const double factor = 1.0 / std::sqrt(squares / static_cast<double>(width) + epsilon);
    const auto along = static_cast<float>(factor * factor * factor * product / static_cast<double>(width));
    const auto scale = static_cast<float>(factor);
#pragma omp simd
    for (std::int64_t i = 0; i < width; ++i) to[i] += scale * gain[static_cast<std::size_t>(i)] * d[i] - along * in[i];
  });
}

void silu_product_backward(const float* gate, float* up, float* d_out, std::int64_t rows, std::int64_t width,
                           int threads) {
  for_rows(rows, threads, [&](std::int64_t row) {
    const float* g = gate + row * width;
    float* u = up + row * width;
    float* d = d_out + row * width;
    for (std::int64_t i = 0; i < width; ++i) {
      const float sigmoid = 1.0F / (1.0F + std::exp(-g[i]));
      const float d_gate = d[i] * u[i] * sigmoid * (1.0F + g[i] * (1.0F - sigmoid));
      u[i] = d[i] * g[i] * sigmoid;
      d[i] = d_gate;
    }
  });
}

void gated_product(Activation activation, float* gate, const float* up, std::int64_t rows, std::int64_t width,
                   const ProductOptions& options) {
  if (activation != Activation::gelu) {
    const ProductLevel& level = products_of(options.isa.value_or(default_isa()));
    for_rows(rows, options.threads,
             [&](std::int64_t row) { level.gated(activation, gate + row * width, up + row * width, width); });
    return;
  }
  for_rows(rows, options.threads, [&](std::int64_t row) {
    float* g = gate + row * width;
    const float* u = up + row * width;
    for (std::int64_t i = 0; i < width; ++i) {
      g[i] *= 0.5F * (1.0F + std::erf(g[i] * std::numbers::sqrt2_v<float> / 2)) * u[i];
    }
  });
}

void add_bias(float* x, std::int64_t rows, std::span<const float> bias, int threads) {
  if (bias.empty()) return;
  const auto width = static_cast<std::int64_t>(bias.size());
  for_rows(rows, threads, [&](std::int64_t row) {
    float* to = x + row * width;
#pragma omp simd
    for (std::int64_t i = 0; i < width; ++i) to[i] += bias[static_cast<std::size_t>(i)];
  });
}

void scale(float* x, std::int64_t rows, std::int64_t width, float factor, int threads) {
  for_rows(rows, threads, [&](std::int64_t row) {
    float* to = x + row * width;
#pragma omp simd
    for (std::int64_t i = 0; i < width; ++i) to[i] *= factor;
  });
}

void soft_cap(float* x, std::int64_t rows, std::int64_t width, double cap, int threads) {
  const auto most = static_cast<float>(cap);
  for_rows(rows, threads, [&](std::int64_t row) {
    float* to = x + row * width;
    for (std::int64_t i = 0; i < width; ++i) to[i] = most * std::tanh(to[i] / most);
  });
}

void add(float* x, const float* y, std::int64_t rows, std::int64_t width, int threads) {
  for_rows(rows, threads, [&](std::int64_t row) {
    float* to = x + row * width;
    const float* from = y + row * width;
#pragma omp simd
    for (std::int64_t i = 0; i < width; ++i) to[i] += from[i];
  });
}

}  // namespace tessera::model
