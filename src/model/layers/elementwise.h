// Row-wise parts of a decoder layer.
#pragma once

#include <cstdint>
#include <span>

#include "model/matrix.h"
#include "tessera/model.h"

namespace tessera::model {

/// RMSNorm, arXiv:1910.07467: out[r] = x[r] / sqrt(mean(x[r]^2) + epsilon) * gain for rows of gain.size() numbers.
void rms_norm(const float* x, std::int64_t rows, std::span<const float> gain, double epsilon, float* out, int threads);

/// Adds the gradient of x to d_x: with f = 1 / sqrt(mean(x^2) + epsilon) and g = gain * d_out,
/// d_x += f * g - x * f^3 * mean(x * g).
void rms_norm_backward(const float* x, std::int64_t rows, std::span<const float> gain, double epsilon,
                       const float* d_out, float* d_x, int threads);

/// gate[r] = f(gate[r]) * up[r], the middle of gated feed-forward layers, arXiv:2002.05202. `width` numbers per row.
void gated_product(Activation activation, float* gate, const float* up, std::int64_t rows, std::int64_t width,
                   const ProductOptions& options);

/// Gradients of silu(gate) * up: the one of gate replaces d_out, the one of up replaces up.
void silu_product_backward(const float* gate, float* up, float* d_out, std::int64_t rows, std::int64_t width,
                           int threads);

/// x[r] += bias for rows of bias.size() numbers; an empty bias adds nothing.
void add_bias(float* x, std::int64_t rows, std::span<const float> bias, int threads);

/// x[i] *= factor for rows * width numbers.
void scale(float* x, std::int64_t rows, std::int64_t width, float factor, int threads);

/// x = cap * tanh(x / cap) for rows * width numbers.
void soft_cap(float* x, std::int64_t rows, std::int64_t width, double cap, int threads);

/// x[i] += y[i] for rows * width numbers.
void add(float* x, const float* y, std::int64_t rows, std::int64_t width, int threads);

}  // namespace tessera::model
