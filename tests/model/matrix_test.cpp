// Products with weight matrices of every type against float64, on every instruction set; gated activations.
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "core/convert.h"
#include "model/block_matrix.h"
#include "model/layers/elementwise.h"
#include "model/matrix.h"
#include "model/products.h"

namespace tessera::model {
namespace {

std::vector<float> random_floats(std::int64_t count, std::uint64_t seed) {
  std::mt19937_64 generator(seed);
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) value = static_cast<float>(static_cast<double>(generator() >> 11) * 0x1p-52 - 1);
  return values;
}

struct Stored {
  Stored(std::int64_t outputs, std::int64_t inputs, DType dtype, std::size_t shift = 0)
      : bytes(static_cast<std::size_t>(outputs * inputs) * size_of(dtype) + shift),
        values(random_floats(outputs * inputs, 5)) {
    from_float(values.data(), outputs * inputs, dtype, bytes.data());
    to_float(bytes.data(), dtype, outputs * inputs, values.data());
    if (shift > 0) std::move_backward(bytes.begin(), bytes.end() - static_cast<std::ptrdiff_t>(shift), bytes.end());
    matrix = std::make_unique<DenseMatrix>(std::span<const std::byte>(bytes).subspan(shift), dtype, outputs, inputs);
  }
  std::vector<std::byte> bytes;
  std::vector<float> values;  ///< as stored
  std::unique_ptr<DenseMatrix> matrix;
};

/// Largest error over the sum of the magnitudes of the terms.
double error_of(const Stored& stored, const std::vector<float>& x, std::int64_t rows, const std::vector<float>& y) {
  const std::int64_t inputs = stored.matrix->inputs();
  const std::int64_t outputs = stored.matrix->outputs();
  double worst = 0;
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t o = 0; o < outputs; ++o) {
      double sum = 0;
      double size = 0;
      for (std::int64_t i = 0; i < inputs; ++i) {
        const double term = static_cast<double>(x[static_cast<std::size_t>(r * inputs + i)]) *
                            static_cast<double>(stored.values[static_cast<std::size_t>(o * inputs + i)]);
        sum += term;
        size += std::abs(term);
      }
      worst = std::max(worst, std::abs(sum - static_cast<double>(y[static_cast<std::size_t>(r * outputs + o)])) / size);
    }
  }
  return worst;
}

struct Shape {
  std::int64_t outputs;
  std::int64_t inputs;
};

TEST(MatrixTest, EqualsFloat64OnEveryInstructionSet) {
  for (const auto& [outputs, inputs] : {Shape{1, 1}, Shape{3, 7}, Shape{64, 64}, Shape{130, 65}, Shape{77, 1100}}) {
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      const Stored stored(outputs, inputs, dtype);
      for (const std::int64_t rows : {1, 3, 4, 12, 13, 31}) {
        const auto x = random_floats(rows * inputs, 9);
        for (const Isa isa : supported_isas()) {
          ProductScratch scratch;
          for (const bool exact : {true, false}) {
            std::vector<float> y(static_cast<std::size_t>(rows * outputs), NAN);
            stored.matrix->multiply(x.data(), rows, y.data(), {.exact = exact, .isa = isa, .scratch = &scratch});
            // Rounding activations to bf16 moves each term by 2^-9 of it at most.
            const double bound = !exact && dtype == DType::bf16 ? 0x1p-8 : 3e-6;
            EXPECT_LT(error_of(stored, x, rows, y), bound)
                << outputs << " x " << inputs << ", " << rows << " rows, " << name_of(dtype) << ", " << name_of(isa);
          }
        }
      }
    }
  }
}

TEST(MatrixTest, ExactMeansThatActivationsKeepTheirDigits) {
  const Stored stored(48, 96, DType::bf16);
  const auto x = random_floats(20 * 96, 3);
  std::vector<float> y(20 * 48);
  stored.matrix->multiply(x.data(), 20, y.data(), {.exact = true});
  EXPECT_LT(error_of(stored, x, 20, y), 1e-6);
  if (default_isa() != Isa::avx512_bf16) GTEST_SKIP() << "no products of bf16 here";
  stored.matrix->multiply(x.data(), 20, y.data(), {.exact = false});
  EXPECT_GT(error_of(stored, x, 20, y), 1e-5);
}

TEST(MatrixTest, ThreadsAndScratchChangeNothing) {
  const Stored stored(200, 300, DType::bf16);
  for (const std::int64_t rows : {2, 50}) {
    const auto x = random_floats(rows * 300, 4);
    std::vector<float> one(static_cast<std::size_t>(rows * 200));
    stored.matrix->multiply(x.data(), rows, one.data(), {.threads = 1});
    ProductScratch scratch;
    for (const int threads : {2, 5}) {
      std::vector<float> many(one.size());
      stored.matrix->multiply(x.data(), rows, many.data(), {.threads = threads, .scratch = &scratch});
      EXPECT_EQ(one, many);
    }
  }
}

TEST(MatrixTest, TogetherAsAlone) {
  const std::int64_t inputs = 96;
  std::vector<std::byte> bytes;
  std::mt19937 random(2);
  for (std::int64_t block = 0; block < 50 * inputs / 32; ++block) {
    bytes.push_back(std::byte{0});
    bytes.push_back(std::byte{0x20});  // the scale 2^-7
    for (int i = 0; i < 32; ++i) bytes.push_back(static_cast<std::byte>(random()));
  }
  const BlockMatrix blocks(bytes, GgmlType::q8_0, 50, inputs);
  const BlockMatrix part(std::span<const std::byte>(bytes).first(static_cast<std::size_t>(7 * inputs / 32 * 34)),
                         GgmlType::q8_0, 7, inputs);
  const Stored stored(20, inputs, DType::bf16);
  const std::vector<std::vector<const Matrix*>> groups{
      {&blocks, &part}, {&part, stored.matrix.get(), &blocks}, {stored.matrix.get()}};
  for (const auto& group : groups) {
    for (const std::int64_t rows : {1, 8, 9}) {
      const auto x = random_floats(rows * inputs, 4);
      for (const bool exact : {false, true}) {
        const ProductOptions options{.threads = 2, .exact = exact};
        std::vector<std::vector<float>> results;
        results.reserve(group.size());
        for (const Matrix* matrix : group) results.emplace_back(static_cast<std::size_t>(rows * matrix->outputs()));
        std::vector<MatrixProduct> products;
        for (std::size_t i = 0; i < group.size(); ++i) products.push_back({group[i], results[i].data()});
        multiply_together(products, x.data(), rows, options);
        for (std::size_t i = 0; i < group.size(); ++i) {
          std::vector<float> alone(results[i].size());
          group[i]->multiply(x.data(), rows, alone.data(), options);
          EXPECT_EQ(results[i], alone) << i << ", " << rows << " rows, exact " << exact;
        }
      }
    }
  }
}

TEST(MatrixTest, RowsAndGradientsOfAnyAlignment) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const Stored stored(5, 9, dtype, 1);
    EXPECT_GT(stored.matrix->heap_bytes(), 0U);  // bytes at odd addresses are copied
    std::vector<float> row(9);
    stored.matrix->row(3, row.data());
    EXPECT_TRUE(std::equal(row.begin(), row.end(), stored.values.begin() + 27));
    const auto d_y = random_floats(2 * 5, 6);
    std::vector<float> d_x(2 * 9);
    stored.matrix->multiply_back(d_y.data(), 2, d_x.data(), 0);
    for (std::size_t r = 0; r < 2; ++r) {
      for (std::size_t i = 0; i < 9; ++i) {
        double sum = 0;
        for (std::size_t o = 0; o < 5; ++o)
          sum += static_cast<double>(d_y[r * 5 + o]) * static_cast<double>(stored.values[o * 9 + i]);
        EXPECT_NEAR(d_x[r * 9 + i], sum, 1e-5);
      }
    }
  }
}

TEST(MatrixTest, ValuesThatAreNotFinite) {
  const std::int64_t rows = 16;
  const Stored stored(40, 70, DType::bf16);
  auto x = random_floats(rows * 70, 8);
  x[3 * 70 + 69] = INFINITY;
  x[5 * 70] = NAN;
  std::vector<float> y(static_cast<std::size_t>(rows * 40));
  stored.matrix->multiply(x.data(), rows, y.data(), {});
  for (std::size_t i = 0; i < y.size(); ++i) EXPECT_EQ(std::isfinite(y[i]), i / 40 != 3 && i / 40 != 5) << i;
}

TEST(GatedProductTest, FollowsTheDefinitions) {
  const std::int64_t width = 37;
  std::vector<float> gate;
  for (std::int64_t i = 0; i < 2 * width; ++i) gate.push_back(static_cast<float>(i - width) * 0.7F);
  gate[0] = -200;
  gate[1] = 200;
  const auto up = random_floats(2 * width, 2);
  for (const Isa isa : supported_isas()) {
    for (const Activation activation : {Activation::silu, Activation::gelu, Activation::gelu_tanh}) {
      std::vector<float> out = gate;
      gated_product(activation, out.data(), up.data(), 2, width, {.isa = isa});
      for (std::size_t i = 0; i < out.size(); ++i) {
        const double x = static_cast<double>(gate[i]);
        double expected = x / (1 + std::exp(-x));
        if (activation == Activation::gelu) expected = x * std::erfc(-x / std::sqrt(2.0)) / 2;
        if (activation == Activation::gelu_tanh) {
          expected = x / 2 * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
        }
        expected *= static_cast<double>(up[i]);
        EXPECT_NEAR(static_cast<double>(out[i]), expected, 3e-6 * (1 + std::abs(expected)))
            << name_of(activation) << " of " << x << ", " << name_of(isa);
      }
    }
  }
}

}  // namespace
}  // namespace tessera::model
