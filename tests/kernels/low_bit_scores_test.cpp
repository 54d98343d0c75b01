// Estimated scores: quantisation, and the panel kernel of every instruction set against plain loops.
#include "kernels/low_bit_scores.h"

#include <gtest/gtest.h>

#include <limits>
#include <random>

#include "kernels/kernel_case.h"

namespace tessera::testing {
namespace {

using kernels::LowBitKeyPanels;
using kernels::LowBitQueryRows;

TEST(LowBitScores, NumbersAreRoundedToSevenths) {
  const std::vector<float> row{3.5F, -7, 0, 0.49F, 0.51F, -2.5F, 6.6F};  // scale 1; halves go to the even number
  std::vector<std::int8_t> numbers(row.size());
  float scale = 0;
  EXPECT_TRUE(kernels::quantize_to_4_bits(row, numbers.data(), scale));
  EXPECT_EQ(scale, 1.0F);
  EXPECT_EQ(numbers, (std::vector<std::int8_t>{4, -7, 0, 0, 1, -2, 7}));
  const std::vector<float> zeros(7, 0.0F);
  EXPECT_TRUE(kernels::quantize_to_4_bits(zeros, numbers.data(), scale));
  EXPECT_EQ(scale, 1.0F);
  EXPECT_EQ(numbers, std::vector<std::int8_t>(7, 0));
  const std::vector<float> bad{1, std::numeric_limits<float>::infinity(), 2};
  EXPECT_FALSE(kernels::quantize_to_4_bits(bad, numbers.data(), scale));
}

TEST(LowBitScores, EveryLevelFindsTheLargestExcess) {
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  for (const std::int64_t dim : {1, 7, 16, 64, 130}) {
    for (const std::int64_t rows : {1, 5, 64}) {
      const std::int64_t keys = 150;
      std::vector<float> q(static_cast<std::size_t>(rows * dim));
      std::vector<float> k(static_cast<std::size_t>(keys * dim));
      std::vector<float> terms(static_cast<std::size_t>(keys));
      for (float& x : q) x = normal(random);
      for (float& x : k) x = normal(random);
      for (float& x : terms) x = normal(random);
      LowBitKeyPanels panels(keys, dim);
      panels.set(0, 64, k.data());
      panels.set(64, keys - 64, k.data() + 64 * dim);
      LowBitQueryRows queries(dim);
      std::vector<double> expected(10, -std::numeric_limits<double>::infinity());
      std::vector<std::int8_t> a(static_cast<std::size_t>(dim));
      std::vector<std::int8_t> b(static_cast<std::size_t>(dim));
      for (std::int64_t r = 0; r < rows; ++r) {
        const float cut = normal(random);
        const std::span<const float> row(q.data() + r * dim, static_cast<std::size_t>(dim));
        queries.add(row, 0.3F, cut);
        float q_scale = 0;
        kernels::quantize_to_4_bits(row, a.data(), q_scale);
        for (std::int64_t j = 0; j < keys; ++j) {
          float k_scale = 0;
          kernels::quantize_to_4_bits({k.data() + j * dim, static_cast<std::size_t>(dim)}, b.data(), k_scale);
          double dot = 0;
          for (std::int64_t d = 0; d < dim; ++d) dot += a[d] * b[d];
          const double excess = dot * q_scale * 0.3 * k_scale + terms[j] - cut;
          expected[j / 16] = std::max(expected[j / 16], excess);
        }
      }
      const std::vector<float> offsets = panels.offsets(terms);
      for (const TestedLevel& level : tested_levels()) {
        std::vector<float> excess(10);
        level.kernels->low_bit_excess(queries.view(), panels.view(offsets), 0, 10, excess.data());
        for (std::size_t g = 0; g < 10; ++g) {
          ASSERT_NEAR(excess[g], expected[g], 1e-4) << level.name << ", dim " << dim << ", rows " << rows << ", " << g;
        }
        level.kernels->low_bit_excess(queries.view(), panels.view(offsets), 7, 2, excess.data());
        ASSERT_NEAR(excess[1], expected[8], 1e-4) << level.name;
      }
    }
  }
}

TEST(LowBitScores, EstimatesAreOffByHalfAStepOfEachSide) {
  std::mt19937 random(6);
  std::normal_distribution<float> normal;
  const std::int64_t dim = 64;
  for (int round = 0; round < 50; ++round) {
    std::vector<float> q(dim);
    std::vector<float> k(dim);
    for (float& x : q) x = normal(random);
    for (float& x : k) x = normal(random);
    LowBitKeyPanels panels(1, dim);
    panels.set(0, 1, k.data());
    LowBitQueryRows queries(dim);
    queries.add(q, 1, 0);
    const std::vector<float> none{0.0F};
    std::vector<float> estimate(1);
    kernels::low_bit_excess(queries, panels, panels.offsets(none), 0, estimate, default_isa());
    double exact = 0;
    double bound = 1e-4;
    const double q_half = queries.view().scale[0] / 2;
    float k_scale = 0;
    std::vector<std::int8_t> numbers(dim);
    kernels::quantize_to_4_bits(k, numbers.data(), k_scale);
    for (std::int64_t d = 0; d < dim; ++d) {
      exact += static_cast<double>(q[d]) * k[d];
      bound += q_half * std::fabs(k[d]) + k_scale / 2 * (std::fabs(q[d]) + q_half);
    }
    EXPECT_LE(std::fabs(estimate[0] - exact), bound);
    EXPECT_NE(estimate[0], exact);
  }
}

TEST(LowBitScores, UndefinedTokensExceedEverywhere) {
  const std::int64_t dim = 8;
  std::vector<float> k(40 * dim, 1.0F);
  k[20 * dim + 3] = std::nanf("");
  LowBitKeyPanels panels(40, dim);
  panels.set(0, 40, k.data());
  const std::vector<float> zeros(40, 0.0F);
  const std::vector<float> offsets = panels.offsets(zeros);
  std::vector<float> row(dim, -1.0F);
  for (const TestedLevel& level : tested_levels()) {
    std::vector<float> excess(3);
    LowBitQueryRows queries(dim);
    queries.add(row, 1, 0);
    level.kernels->low_bit_excess(queries.view(), panels.view(offsets), 0, 3, excess.data());
    EXPECT_LT(excess[0], 0);
    EXPECT_GT(excess[1], 0);
    EXPECT_LT(excess[2], 0);  // its padding counts for nothing
    for (const float cut :
         {std::nanf(""), std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity()}) {
      queries.clear();
      queries.add(row, 1, cut);
      level.kernels->low_bit_excess(queries.view(), panels.view(offsets), 0, 3, excess.data());
      EXPECT_TRUE(excess[0] > 0 && excess[1] > 0 && excess[2] > 0) << level.name << " " << cut;
    }
  }
}

}  // namespace
}  // namespace tessera::testing
