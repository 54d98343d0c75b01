// Weight matrices in the form in which their files hold them, and where they come from.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "tessera/attention.h"
#include "tessera/core.h"

namespace tessera::kernels {
struct BlockRows;
}

namespace tessera::model {

/// Memory that products use again. One product at a time.
struct ProductScratch {
  std::vector<std::uint32_t> rows;    ///< activations as the product reads them
  std::vector<std::uint32_t> panels;  ///< packed weights, per thread
};

struct ProductOptions {
  int threads = 0;
  bool exact = false;                 ///< see SessionOptions::exact_products
  std::optional<Isa> isa = {};        ///< absent: default_isa()
  ProductScratch* scratch = nullptr;  ///< null: allocated and freed by the call
};

struct ProductLevel;

/// A weight matrix [outputs][inputs]. Immutable.
class Matrix {
 public:
  Matrix(std::int64_t outputs, std::int64_t inputs) : outputs_(outputs), inputs_(inputs) {}
  virtual ~Matrix() = default;
  Matrix(const Matrix&) = delete;
  Matrix& operator=(const Matrix&) = delete;

  std::int64_t outputs() const { return outputs_; }
  std::int64_t inputs() const { return inputs_; }
  /// y[r][o] = sum_i x[r][i] * weight[o][i] for `rows` rows; x and y are contiguous. Results depend neither on the
  /// number of threads nor on the rows that are multiplied together with a row, beyond rounding.
  virtual void multiply(const float* x, std::int64_t rows, float* y, const ProductOptions& options) const = 0;
  /// Row `output` as floats [inputs].
  virtual void row(std::int64_t output, float* out) const = 0;
  /// The gradient of x: d_x[r][i] = sum_o d_y[r][o] * weight[o][i].
  virtual void multiply_back(const float* d_y, std::int64_t rows, float* d_x, int threads) const = 0;
  /// Bytes that a product with one row reads, in the form of the file.
  virtual std::size_t stored_bytes() const = 0;
  /// The weights where they lie in blocks; else null.
  virtual const kernels::BlockRows* blocks() const { return nullptr; }
  /// Bytes on the heap (mapped ones not counted).
  virtual std::size_t heap_bytes() const { return 0; }

 private:
  std::int64_t outputs_;
  std::int64_t inputs_;
};

/// One of several products of the same activations.
struct MatrixProduct {
  const Matrix* matrix;
  float* y;
};

/// Matrix::multiply for matrices with the same number of inputs. Few rows that meet blocks are prepared once, and
/// threads meet once.
void multiply_together(std::span<const MatrixProduct> products, const float* x, std::int64_t rows,
                       const ProductOptions& options);

/// A matrix of f32, bf16 or f16 numbers that somebody else keeps.
class DenseMatrix final : public Matrix {
 public:
  /// `bytes` holds outputs * inputs numbers from any address on. Numbers of more than 2 bytes that are not aligned are
  /// copied.
  DenseMatrix(std::span<const std::byte> bytes, DType dtype, std::int64_t outputs, std::int64_t inputs);

  void multiply(const float* x, std::int64_t rows, float* y, const ProductOptions& options) const override;
  void row(std::int64_t output, float* out) const override;
  void multiply_back(const float* d_y, std::int64_t rows, float* d_x, int threads) const override;
  std::size_t stored_bytes() const override { return static_cast<std::size_t>(outputs() * inputs()) * size_of(dtype_); }
  std::size_t heap_bytes() const override { return copy_.size(); }

 private:
  const std::byte* row_bytes(std::int64_t output) const;
  void stream(const ProductLevel& level, const float* x, std::int64_t rows, float* y, int threads) const;
  void pack(const ProductLevel& level, const float* x, std::int64_t rows, float* y,
            const ProductOptions& options) const;

  const std::byte* data_;
  DType dtype_;
  std::vector<std::byte> copy_;
};

/// Tensors by the names of the Hugging Face layout. load_weights() asks for all that a configuration describes.
class TensorSource {
 public:
  virtual ~TensorSource() = default;
  virtual bool has(const std::string& tensor) const = 0;
  /// Rows [first, first + rows) of a tensor that has `of` rows of `columns` numbers in all; tensors of three axes count
  /// as rows of the last one. Throws Error for a tensor that is missing or has another shape or type.
  virtual std::unique_ptr<Matrix> matrix(const std::string& tensor, std::int64_t first, std::int64_t rows,
                                         std::int64_t of, std::int64_t columns) = 0;
  /// A tensor of one axis as floats.
  virtual std::vector<float> vector(const std::string& tensor, std::int64_t size) = 0;
  /// Throws Error for a tensor that nobody asked for and whose name begins with none of `harmless`: it would be left
  /// out of the computation in silence.
  virtual void check_all_used(std::span<const std::string> harmless) const = 0;
  /// Memory of the process that the tensors lie in; 0 where files are mapped.
  virtual std::size_t copied_bytes() const = 0;
};

}  // namespace tessera::model
