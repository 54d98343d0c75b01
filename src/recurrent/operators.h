// What layers of linear attention do around the recurrence: short convolutions, gates, norms. Each on rows of one head.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace tessera::recurrent {

/// x * sigmoid(x).
float silu(float x);
float sigmoid(float x);
/// log(1 + e^x) without overflow.
float softplus(float x);

/// Causal depthwise convolution with SiLU, y_t[c] = silu(sum_m weights[m][c] x_(t - width + 1 + m)[c]), from `x`
/// [tokens][dim] to `y` (which may be x). `tail` [width - 1][dim] holds the rows before the first (zeros at the start
/// of a sequence) and receives the last ones. Source: arXiv:2510.26692, section on short convolutions; width 4 there.
void short_convolution(const float* x, std::int64_t tokens, std::int64_t dim, std::span<const float> weights,
                       std::span<float> tail, float* y);

/// Log decay -exp(a_log) * softplus(a + bias) of Gated DeltaNet and KDA.
float softplus_decay(float a, float bias, float a_log);
/// Log decay lower_bound * sigmoid(exp(a_log) * (a + bias)), between lower_bound (negative) and 0: KDA's bounded gate.
float bounded_decay(float a, float bias, float a_log, float lower_bound);

/// ALiBi's slopes: 2^(-8 (h + 1) / heads) for a power of two; otherwise those of the largest power of two below, then
/// every second of the next one.
std::vector<float> alibi_slopes(std::int64_t heads);

/// row <- row / sqrt(mean of squares + epsilon).
void rms_normalise(std::span<float> row, float epsilon);

}  // namespace tessera::recurrent
