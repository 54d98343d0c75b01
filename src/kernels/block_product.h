// Few rows of activations times weights in ggml blocks, read as they lie: decoding at the speed of memory.
#pragma once

#include <cstdint>
#include <span>

#include "kernels/cpu/blocks.h"
#include "tessera/attention.h"

namespace tessera::kernels {

/// One of several products of the same activations.
struct BlockProduct {
  BlockRows weights;
  float* y;
};

/// y[r][o] = sum_i x[r][i] * weight[o][i] for `rows` rows; x and y are contiguous. Activations are rounded to signed
/// bytes with a scale per 32 of them, as llama.cpp does it; the rest is float32 up to rounding. Results do not depend
/// on the number of threads.
void multiply_blocks(const BlockRows& weights, const float* x, std::int64_t rows, float* y, int threads, Isa isa);
/// The same for matrices with the same number of inputs: activations are rounded once, and threads meet once.
void multiply_blocks(std::span<const BlockProduct> products, const float* x, std::int64_t rows, int threads, Isa isa);

/// Blocks of quantised types as floats, up to rounding what dequantise() gives.
void widen_blocks(GgmlType type, const std::byte* blocks, std::int64_t numbers, float* out, Isa isa);

}  // namespace tessera::kernels
