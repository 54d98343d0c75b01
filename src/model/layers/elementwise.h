// Row-wise parts of a decoder layer.
#pragma once

#include <cstdint>
#include <span>

namespace tessera::model {

/// RMSNorm, arXiv:1910.07467: out[r] = x[r] / sqrt(mean(x[r]^2) + epsilon) * gain for rows of gain.size() numbers.
void rms_norm(const float* x, std::int64_t rows, std::span<const float> gain, double epsilon, float* out, int threads);

/// gate[r] = silu(gate[r]) * up[r], the middle of SwiGLU, arXiv:2002.05202. `width` numbers per row.
void silu_product(float* gate, const float* up, std::int64_t rows, std::int64_t width, int threads);

/// x[i] += y[i] for rows * width numbers.
void add(float* x, const float* y, std::int64_t rows, std::int64_t width, int threads);

}  // namespace tessera::model
