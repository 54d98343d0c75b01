// The steps of a layer around the recurrence.
#include "recurrent/operators.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>

namespace tessera::recurrent {
namespace {

TEST(Operators, SoftplusNeverOverflows) {
  EXPECT_FLOAT_EQ(softplus(0), std::log(2.0F));
  EXPECT_FLOAT_EQ(softplus(200), 200);
  EXPECT_GT(softplus(-80), 0);
  EXPECT_LT(softplus(-80), 1e-30F);
  EXPECT_FLOAT_EQ(softplus_decay(1, 2, std::log(3.0F)), -3 * std::log1p(std::exp(3.0F)));
}

TEST(Operators, BoundedDecayKeepsItsBounds) {
  EXPECT_FLOAT_EQ(bounded_decay(0, 0, 0, -5), -2.5F);
  EXPECT_FLOAT_EQ(bounded_decay(300, 0, 1, -5), -5);
  EXPECT_LE(bounded_decay(-300, 0, 1, -5), 0);
  EXPECT_GT(bounded_decay(-300, 0, 1, -5), -1e-6F);
}

TEST(Operators, SlopesOfPowersOfTwoAndOthers) {
  const std::vector<float> eight = alibi_slopes(8);
  for (std::size_t h = 0; h < 8; ++h) EXPECT_FLOAT_EQ(eight[h], std::exp2(-1.0F - static_cast<float>(h)));
  const std::vector<float> twelve = alibi_slopes(12);
  ASSERT_EQ(twelve.size(), 12U);
  const std::vector<float> sixteen = alibi_slopes(16);
  for (std::size_t h = 0; h < 8; ++h) EXPECT_EQ(twelve[h], eight[h]);
  for (std::size_t h = 0; h < 4; ++h) EXPECT_EQ(twelve[8 + h], sixteen[2 * h]);
  EXPECT_EQ(alibi_slopes(1), std::vector<float>{1.0F / 256});
}

TEST(Operators, ConvolutionContinuesWithItsTail) {
  std::array<float, 12> x{};
  for (std::size_t i = 0; i < 12; ++i) x[i] = static_cast<float>(i) - 5;
  const std::array<float, 6> weights{0.5F, -1, 2, 0.25F, 1, 1};  // width 3, two channels
  std::array<float, 4> tail{};
  std::array<float, 12> whole{};
  short_convolution(x.data(), 6, 2, weights, tail, whole.data());
  EXPECT_FLOAT_EQ(whole[0], silu(-5.0F));                              // only the newest row: the history is 0
  EXPECT_FLOAT_EQ(whole[5], silu(-1 * -4.0F + 0.25F * -2.0F + 0.0F));  // rows 0, 1, 2 of channel 1
  EXPECT_EQ(tail, (std::array<float, 4>{3, 4, 5, 6}));
  std::array<float, 4> running{};
  std::array<float, 12> parts = x;  // in place, one token, then none, then the rest
  short_convolution(parts.data(), 1, 2, weights, running, parts.data());
  short_convolution(parts.data(), 0, 2, weights, running, parts.data());
  short_convolution(parts.data() + 2, 5, 2, weights, running, parts.data() + 2);
  EXPECT_EQ(parts, whole);
  EXPECT_EQ(running, tail);
}

TEST(Operators, RmsNormHasUnitMeanSquare) {
  std::array<float, 4> row{3, -4, 0, 5};
  rms_normalise(row, 0);
  EXPECT_NEAR(row[0] * row[0] + row[1] * row[1] + row[3] * row[3], 4, 1e-5);
  std::array<float, 2> zero{0, 0};
  rms_normalise(zero, 1e-5F);
  EXPECT_EQ(zero[0], 0);
}

}  // namespace
}  // namespace tessera::recurrent
