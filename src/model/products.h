// Products of activations with weight matrices in f32, bf16 or f16, one build per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tessera/attention.h"
#include "tessera/core.h"
#include "tessera/model.h"

namespace tessera::model {

/// Outputs that one call of ProductLevel::panel computes at most.
constexpr std::int64_t kPanelOutputs = 64;
/// Words of the depth that are packed at a time: 64 outputs x 512 words stay in a core's second-level cache.
constexpr std::int64_t kPanelWords = 512;
/// Rows that ProductLevel::dots takes at once.
constexpr std::int64_t kDotRows = 4;

/// A few neighbouring outputs of a product.
struct PanelCall {
  const std::byte* weights = nullptr;  ///< [outputs][inputs]
  DType dtype = DType::f32;
  std::int64_t inputs = 0;
  std::int64_t outputs = 0;          ///< at most kPanelOutputs
  const std::uint32_t* x = nullptr;  ///< [rows][words]: floats, or pairs of bf16 filled up with zeros
  bool pairs = false;                ///< x and weights are bf16, and products are of pairs
  std::int64_t words = 0;
  std::int64_t rows = 0;
  float* y = nullptr;
  std::int64_t y_stride = 0;
  std::uint32_t* packed = nullptr;   ///< kPanelOutputs * kPanelWords words
  std::uint32_t* widened = nullptr;  ///< 16 * kPanelWords words
};

struct ProductLevel {
  /// y[r * y_stride + o] = x[r] . weights[o] for `outputs` rows of weights, straight from memory; rows <= kDotRows.
  void (*dots)(const std::byte* weights, DType dtype, std::int64_t inputs, std::int64_t outputs, const float* x,
               std::int64_t rows, float* y, std::int64_t y_stride);
  /// The same for many rows: weights are packed, products stay in registers.
  void (*panel)(const PanelCall& call);
  /// to [words * 2] = x [count] rounded to bf16, zeros behind; null where pairs cannot be multiplied.
  void (*round_pairs)(const float* x, std::int64_t count, std::uint16_t* to, std::int64_t words);
  /// gate = f(gate) * up for silu and gelu_tanh.
  void (*gated)(Activation activation, float* gate, const float* up, std::int64_t count);
};

const ProductLevel& products_portable();
const ProductLevel& products_avx2();
const ProductLevel& products_avx512();
const ProductLevel& products_avx512_bf16();
const ProductLevel& products_neon();
const ProductLevel& products_of(Isa isa);

}  // namespace tessera::model
