// XAttention: what the antidiagonal score sees, and the budget with its forced tiles.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "methods/masks.h"

namespace tessera {
namespace {

using test::AttentionCase;
using test::masks_of;

constexpr std::int64_t kTokens = 1024;

/// All queries equal e_0, keys zero: every structure of the scores is what the test plants.
AttentionCase blank(std::int64_t heads = 1) {
  AttentionCase input({.name = "blank", .q_heads = heads, .q_len = kTokens, .kv_len = kTokens});
  for (std::int64_t n = 0; n < kTokens; ++n) {
    for (std::int64_t d = 0; d < 16; ++d) {
      for (std::int64_t h = 0; h < heads; ++h) input.set_q(0, h, n, d, d == 0 ? 1.0F : 0.0F);
      input.set_k(0, 0, n, d, 0);
    }
  }
  return input;
}

TEST(XAttention, VerticalLineIsFoundAtEveryPlaceInsideAPatch) {
  // One hot key meets every stride x stride patch exactly once, wherever it lies in its group.
  for (std::int64_t key = 256; key < 272; ++key) {
    AttentionCase input = blank();
    input.set_k(0, 0, key, 0, 900);
    const auto mask = masks_of("xattention:stride=16,tau=0.6,block=128", input)[0];
    for (std::int64_t n = 384; n < kTokens; ++n) ASSERT_TRUE(mask.at(n, 256)) << "key " << key << ", query " << n;
    EXPECT_FALSE(mask.at(1023, 512)) << "tiles without mass are left out";
  }
}

TEST(XAttention, SlashLineOfWidthTwoIsFound) {
  // Queries at position p point at keys p - 384 and p - 385: planted through one random code per position.
  AttentionCase input({.name = "slash", .q_heads = 1, .q_len = kTokens, .kv_len = kTokens, .head_dim = 64});
  for (std::int64_t n = 0; n + 384 < kTokens; ++n) {
    for (std::int64_t d = 0; d < 64; ++d) {
      const float next = n + 1 < kTokens ? input.k(0, 0, n + 1, d) : 0;
      input.set_q(0, 0, n + 384, d, 3 * input.k(0, 0, n, d) + 0 * next);
    }
  }
  for (std::int64_t n = 385; n < kTokens; ++n) {
    for (std::int64_t d = 0; d < 64; ++d) {
      input.set_q(0, 0, n, d, 3 * (input.k(0, 0, n - 384, d) + input.k(0, 0, n - 385, d)));
    }
  }
  const auto mask = masks_of("xattention:stride=8,tau=0.7,block=128", input)[0];
  for (std::int64_t n = 512; n < kTokens; ++n) ASSERT_TRUE(mask.at(n, n - 384)) << "query " << n;
}

TEST(XAttention, KeepsFirstAndDiagonalTileAtAnyBudget) {
  const AttentionCase input({.name = "random", .q_len = 700, .kv_len = 900});
  for (const auto& mask : masks_of("xattention:stride=8,tau=0,block=64", input)) {
    for (std::int64_t n = 0; n < 700; ++n) {
      ASSERT_TRUE(mask.at(n, 0));
      ASSERT_TRUE(mask.at(n, n + 200));
    }
  }
}

TEST(XAttention, StrideOneReachesTauOfTheTrueMass) {
  const AttentionCase input({.name = "mass", .q_len = 512, .kv_len = 512});
  const auto masks = masks_of("xattention:stride=1,tau=0.8,block=64", input);
  for (std::int64_t h = 0; h < 2; ++h) {
    for (std::int64_t tile = 0; tile < 8; ++tile) {
      double kept = 0;
      std::vector<double> tiles(8, 0.0);
      for (std::int64_t n = tile * 64; n < tile * 64 + 64; ++n) {
        const auto p = input.probabilities(0, h, n);
        for (std::int64_t j = 0; j < 512; ++j) {
          tiles[j / 64] += p[j];
          if (masks[h].at(n, j)) kept += p[j];
        }
      }
      EXPECT_GE(kept / 64, 0.8 - 1e-4);
      // Without its smallest unforced tile the row would fall short.
      double smallest = 64;
      for (std::int64_t j = 1; j < tile; ++j) {
        if (masks[h].at(tile * 64, j * 64)) smallest = std::min(smallest, tiles[j]);
      }
      if (smallest < 64) {
        EXPECT_LT((kept - smallest) / 64, 0.8 + 1e-4);
      }
    }
  }
}

TEST(XAttention, BidirectionalForcesNothing) {
  AttentionCase input({.name = "two_sided", .q_heads = 1, .q_len = 256, .kv_len = 512, .causal = false});
  for (std::int64_t n = 0; n < 256; ++n) input.set_q(0, 0, n, 0, 6);
  for (std::int64_t j = 320; j < 384; ++j) input.set_k(0, 0, j, 0, 12);
  const auto mask = masks_of("xattention:stride=8,tau=0.5,block=64", input)[0];
  for (std::int64_t n = 0; n < 256; ++n) {
    for (std::int64_t j = 0; j < 512; ++j) ASSERT_EQ(mask.at(n, j), j >= 320 && j < 384);
  }
}

TEST(XAttention, ThresholdsAreReadPerLayerAndHead) {
  const std::string path = testing::TempDir() + "thresholds.json";
  std::ofstream(path) << "[[1, 0], [0, 1]]";
  const AttentionCase input({.name = "heads", .q_len = 600, .kv_len = 600});
  const auto method = make_method("xattention:block=64,thresholds=" + path);
  const auto dense = test::dense_masks(input);
  for (std::int64_t layer = 0; layer < 2; ++layer) {
    const auto masks = masks_of(*method, input, 0, layer);
    EXPECT_TRUE(masks[layer] == dense[layer]);
    EXPECT_FALSE(masks[1 - layer] == dense[1 - layer]);
  }
  EXPECT_THROW(masks_of(*method, input, 0, 2), Error) << "the table has two layers";
  const AttentionCase one_head({.name = "one", .q_heads = 1, .q_len = 600, .kv_len = 600});
  EXPECT_THROW(masks_of(*method, one_head), Error) << "the table has two heads";
  std::ofstream(path) << "[[1, 2]]";
  EXPECT_THROW(make_method("xattention:thresholds=" + path), Error) << "2 is no share";
  std::filesystem::remove(path);
}

TEST(XAttention, NeedsTensors) {
  Problem problem;
  problem.q_len = problem.kv_len = 1000;
  problem.head_dim = problem.value_dim = 64;
  problem.causal = true;
  EXPECT_THROW(make_method("xattention")->plan(problem, {}, {}), Error);
}

}  // namespace
}  // namespace tessera
