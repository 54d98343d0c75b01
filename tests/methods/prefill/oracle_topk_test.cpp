// The yardstick against selections made of float64 probabilities.
#include <gtest/gtest.h>

#include <set>

#include "methods/masks.h"

namespace tessera {
namespace {

using test::AttentionCase;
using test::masks_of;

/// Indices of the best k by (score descending, index ascending).
std::set<std::int64_t> best(const std::vector<double>& scores, std::int64_t k) {
  std::vector<std::pair<double, std::int64_t>> order;
  for (std::size_t j = 0; j < scores.size(); ++j) order.emplace_back(-scores[j], static_cast<std::int64_t>(j));
  std::sort(order.begin(), order.end());
  std::set<std::int64_t> kept;
  for (std::int64_t i = 0; i < std::min<std::int64_t>(k, static_cast<std::int64_t>(order.size())); ++i) {
    kept.insert(order[i].second);
  }
  return kept;
}

/// Mass per unit of `unit` keys of one query tile.
std::vector<double> masses(const AttentionCase& input, std::int64_t h, std::int64_t first, std::int64_t rows,
                           std::int64_t unit) {
  std::vector<double> sums;
  for (std::int64_t n = first; n < std::min(first + rows, input.problem.q_len); ++n) {
    const auto p = input.probabilities(0, h, n);
    sums.resize((p.size() + unit - 1) / unit, 0.0);
    for (std::size_t j = 0; j < p.size(); ++j) sums[j / unit] += p[j];
  }
  // Units that no row sees do not compete.
  while (!sums.empty() && sums.back() == 0) sums.pop_back();
  return sums;
}

TEST(OracleTopK, BlocksAreTheHeaviestOfDenseAttention) {
  const AttentionCase input({.name = "blocks", .q_heads = 2, .q_len = 200, .kv_len = 420}, 7);
  const auto masks = masks_of("oracle-topk:k=3,block_q=40,block_k=30,diagonal=false", input);
  for (std::int64_t h = 0; h < 2; ++h) {
    std::set<std::int64_t> kept;
    for (std::int64_t n = 0; n < 200; ++n) {
      if (n % 40 == 0) kept = best(masses(input, h, n, 40, 30), 3);
      for (std::int64_t j = 0; j < 420; ++j) {
        ASSERT_EQ(masks[h].at(n, j), input.allowed(0, n, j) && kept.count(j / 30) == 1) << n << ", " << j;
      }
    }
  }
}

TEST(OracleTopK, TokensAreTheHeaviestOfDenseAttention) {
  const AttentionCase input({.name = "tokens", .q_heads = 2, .q_len = 60, .kv_len = 300}, 8);
  for (const std::int64_t block : {1, 16}) {
    const auto masks = masks_of("oracle-topk:unit=token,k=9,diagonal=false,block_q=" + std::to_string(block), input);
    for (std::int64_t h = 0; h < 2; ++h) {
      std::set<std::int64_t> kept;
      for (std::int64_t n = 0; n < 60; ++n) {
        if (n % block == 0) kept = best(masses(input, h, n, block, 1), 9);
        for (std::int64_t j = 0; j < 300; ++j) {
          ASSERT_EQ(masks[h].at(n, j), input.allowed(0, n, j) && kept.count(j) == 1) << n << ", " << j;
        }
      }
    }
  }
}

TEST(OracleTopK, TopPKeepsTheFewestThatHoldTheShare) {
  const AttentionCase input({.name = "share", .q_heads = 1, .q_len = 50, .kv_len = 300}, 9);
  const auto mask = masks_of("oracle-topk:unit=token,rule=topp,p=0.7,block_q=1,diagonal=false", input)[0];
  for (std::int64_t n = 0; n < 50; ++n) {
    const auto p = input.probabilities(0, 0, n);
    double kept = 0;
    double smallest = 1;
    for (std::int64_t j = 0; j < 300; ++j) {
      if (!mask.at(n, j)) continue;
      kept += p[j];
      smallest = std::min(smallest, p[j]);
    }
    EXPECT_GE(kept, 0.7 - 1e-4);
    EXPECT_LT(kept - smallest, 0.7 + 1e-4);
    for (std::int64_t j = 0; j < 300; ++j) {
      if (!mask.at(n, j)) {
        EXPECT_LE(p[j], smallest + 1e-6);
      }
    }
  }
}

TEST(OracleTopK, AlwaysKeptUnitsAreKept) {
  const AttentionCase input({.name = "always", .q_heads = 1, .q_len = 256, .kv_len = 256});
  const auto mask = masks_of("oracle-topk:k=1,block_q=32,block_k=32,sinks=5,local=40,last_rows=3", input)[0];
  for (std::int64_t n = 0; n < 256; ++n) {
    for (std::int64_t j = 0; j <= n; ++j) {
      const bool always = j < 5 || n - j < 40 || n >= 253;
      ASSERT_TRUE(mask.at(n, j) || !always) << n << ", " << j;
    }
  }
}

TEST(OracleTopK, KeepsAtLeastTheMassOfAnyOtherSelectionOfTheSameSize) {
  const AttentionCase input({.name = "yardstick", .q_heads = 1, .q_len = 512, .kv_len = 512});
  const auto oracle = masks_of("oracle-topk:k=4,block_q=64,block_k=64,diagonal=false", input)[0];
  const auto pooled = masks_of("minference:pattern=block_sparse,k=4", input)[0];
  double oracle_mass = 0;
  double pooled_mass = 0;
  for (std::int64_t n = 0; n < 512; ++n) {
    const auto p = input.probabilities(0, 0, n);
    for (std::int64_t j = 0; j <= n; ++j) {
      if (oracle.at(n, j)) oracle_mass += p[j];
      if (pooled.at(n, j)) pooled_mass += p[j];
    }
  }
  EXPECT_GT(oracle_mass, pooled_mass);
}

}  // namespace
}  // namespace tessera
