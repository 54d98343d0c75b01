// Compression of blocks and the importance of selection blocks.
#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "score/block_compression.h"
#include "score/block_importance.h"

namespace tessera::score {
namespace {

TEST(BlockImportance, WeightsOfThePaper) {
  // Tokens of 32 keys every 16, blocks of 64: tokens 4j - 1 .. 4j + 3 count 1, 2, 2, 2, 1.
  for (std::size_t t = 0; t < 12; ++t) {
    std::vector<float> probabilities(12, 0.0F);
    probabilities[t] = 1;
    std::vector<float> importance(3, 0.0F);
    add_block_importance(probabilities, 4, 2, importance);
    for (std::size_t j = 0; j < 3; ++j) {
      const auto place = static_cast<std::int64_t>(t) - (4 * static_cast<std::int64_t>(j) - 1);
      const float expected = place < 0 || place > 4 ? 0 : place == 0 || place == 4 ? 1 : 2;
      EXPECT_EQ(importance[j], expected) << t << " " << j;
    }
  }
}

TEST(BlockImportance, EveryTokenSpreadsItsStrides) {
  for (const std::int64_t r : {1, 2, 4}) {
    for (const std::int64_t e : {1, 2, 3, 6}) {
      std::vector<float> probabilities(16, 1.0F / 16);
      std::vector<float> importance(40, 0.0F);  // blocks for every stride that a token covers
      add_block_importance(probabilities, r, e, importance);
      float sum = 0;
      for (const float x : importance) sum += x;
      EXPECT_NEAR(sum, static_cast<float>(e), 1e-5) << r << " " << e;
    }
  }
}

TEST(BlockImportance, SameBlocksKeepTheProbabilities) {
  const std::vector<float> probabilities{0.1F, 0.2F, 0.3F, 0.4F};
  std::vector<float> importance(4, 0.0F);
  add_block_importance(probabilities, 1, 1, importance);
  EXPECT_EQ(importance, probabilities);
}

TEST(BlockCompression, RaggedTailIsLeftOut) {
  BlockCompression compression;
  compression.length = 8;
  compression.stride = 4;
  EXPECT_EQ(compression.count(7), 0);
  EXPECT_EQ(compression.count(8), 1);
  EXPECT_EQ(compression.count(11), 1);
  EXPECT_EQ(compression.count(12), 2);
}

/// <d_out, forward> has the derivative that backward() gives, for rows and for every weight.
TEST(BlockCompression, BackwardIsTheDerivative) {
  for (const CompressionKind kind :
       {CompressionKind::mean, CompressionKind::pool, CompressionKind::linear, CompressionKind::mlp}) {
    std::mt19937 random(4);
    std::normal_distribution<float> normal;
    const auto draw = [&](std::int64_t count) {
      std::vector<float> values;
      for (std::int64_t i = 0; i < count; ++i) values.push_back(normal(random));
      return values;
    };
    BlockCompression compression;
    compression.kind = kind;
    compression.length = 6;
    compression.stride = 2;
    compression.dim = 3;
    compression.hidden = kind == CompressionKind::mlp ? 5 : 0;
    constexpr std::int64_t n = 13;
    std::vector<float> rows = draw(n * 3);
    CompressionWeights weights;
    weights.positions = draw(18);
    if (kind == CompressionKind::pool) weights.pool = draw(6);
    if (kind == CompressionKind::linear) weights.linear = draw(18 * 3);
    if (kind == CompressionKind::mlp) {
      weights.hidden = draw(18 * 5);
      weights.output = draw(5 * 3);
    }
    const std::vector<float> d_out = draw(compression.count(n) * 3);
    const auto loss = [&] {
      std::vector<float> out(d_out.size());
      compression.forward(rows.data(), n, weights, out.data());
      double sum = 0;
      for (std::size_t i = 0; i < out.size(); ++i) sum += static_cast<double>(out[i]) * d_out[i];
      return sum;
    };
    std::vector<float> d_rows(rows.size(), 0.0F);
    CompressionWeights d_weights = weights;
    for (auto* values :
         {&d_weights.positions, &d_weights.pool, &d_weights.linear, &d_weights.hidden, &d_weights.output}) {
      std::fill(values->begin(), values->end(), 0.0F);
    }
    compression.backward(rows.data(), n, weights, d_out.data(), d_rows.data(), d_weights);
    const auto compare = [&](std::vector<float>& values, const std::vector<float>& gradient) {
      ASSERT_EQ(values.size(), gradient.size());
      for (std::size_t i = 0; i < values.size(); ++i) {
        constexpr float h = 1.0F / 512;  // small beside the kinks of ReLU, large beside float rounding
        const float kept = values[i];
        values[i] = kept + h;
        const double above = loss();
        values[i] = kept - h;
        const double below = loss();
        values[i] = kept;
        ASSERT_NEAR(gradient[i], (above - below) / (2 * h), 0.01 + 1e-3 * std::abs(gradient[i])) << i;
      }
    };
    compare(rows, d_rows);
    compare(weights.positions, d_weights.positions);
    compare(weights.pool, d_weights.pool);
    compare(weights.linear, d_weights.linear);
    compare(weights.hidden, d_weights.hidden);
    compare(weights.output, d_weights.output);
  }
}

}  // namespace
}  // namespace tessera::score
