// Weight matrices whose numbers lie in the blocks of GGUF files.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "io/ggml_blocks.h"
#include "kernels/cpu/blocks.h"
#include "model/matrix.h"

namespace tessera::model {

/// A matrix [outputs][inputs] of blocks along the rows that somebody else keeps. A few rows of activations are rounded
/// to bytes and multiplied with the codes; many rows, and all when products are to be exact, with widened panels.
class BlockMatrix final : public Matrix {
 public:
  BlockMatrix(std::span<const std::byte> blocks, GgmlType type, std::int64_t outputs, std::int64_t inputs);

  void multiply(const float* x, std::int64_t rows, float* y, const ProductOptions& options) const override;
  void row(std::int64_t output, float* out) const override;
  void multiply_back(const float* d_y, std::int64_t rows, float* d_x, int threads) const override;
  std::size_t stored_bytes() const override { return static_cast<std::size_t>(rows_.outputs * rows_.row_bytes); }
  const kernels::BlockRows* blocks() const override { return &rows_; }

 private:
  void multiply_widened(const float* x, std::int64_t rows, float* y, const ProductOptions& options) const;

  kernels::BlockRows rows_;
};

}  // namespace tessera::model
