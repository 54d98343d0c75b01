// Plans from masks and from the block formats of other libraries.
#include <gtest/gtest.h>

#include "plan/random_plans.h"
#include "tessera/plan.h"

namespace tessera {
namespace {

using testing::describe;
using testing::Random;
using testing::uniform;

TEST(PlanFromMask, HoldsExactlyThePairsOfTheMask) {
  Random random(31);
  for (int i = 0; i < 200; ++i) {
    const Problem problem = testing::random_problem(random);
    std::vector<std::uint8_t> mask = testing::allowed_mask(problem);
    const std::int64_t keep = uniform(random, 0, 100);
    const std::int64_t stripe = uniform(random, 1, 40);  // stretches of equal bits, so that whole tiles occur
    for (std::size_t p = 0; p < mask.size(); ++p) {
      if (static_cast<std::int64_t>(p) / stripe * 7919 % 100 >= keep) mask[p] = 0;
    }
    const Plan plan = plan_from_mask(problem, mask, uniform(random, 1, 20), uniform(random, 1, 80));
    SCOPED_TRACE(describe(plan));
    EXPECT_EQ(dense_mask(plan), mask);
  }
}

TEST(PlanFromMask, SharesEqualHeads) {
  Problem problem;
  problem.batch = 2;
  problem.q_heads = 4;
  problem.kv_heads = 2;
  problem.q_len = problem.kv_len = 8;
  problem.head_dim = problem.value_dim = 16;
  std::vector<std::uint8_t> mask(2 * 4 * 64, 1);
  EXPECT_EQ(plan_from_mask(problem, mask, 4, 4).plan_heads, 1);
  EXPECT_EQ(plan_from_mask(problem, mask, 4, 4).plan_sequences, 1);
  for (const std::size_t head : {0, 1, 4, 5}) mask[head * 64] = 0;  // one key/value group of both sequences
  EXPECT_EQ(plan_from_mask(problem, mask, 4, 4).plan_heads, 2);
  mask[0] = 1;
  EXPECT_EQ(plan_from_mask(problem, mask, 4, 4).plan_heads, 4);
  EXPECT_EQ(plan_from_mask(problem, mask, 4, 4).plan_sequences, 2);
  mask.pop_back();
  EXPECT_THROW(plan_from_mask(problem, mask, 4, 4), Error);
}

TEST(PlanFromMask, RefusesForbiddenPairs) {
  Problem problem;
  problem.q_len = problem.kv_len = 8;
  problem.head_dim = problem.value_dim = 16;
  problem.causal = true;
  EXPECT_THROW(plan_from_mask(problem, std::vector<std::uint8_t>(64, 1), 4, 4), Error);
}

TEST(DenseMask, IsRefusedAboveTwoToThe31) {
  Problem problem;
  problem.q_heads = problem.kv_heads = 32;
  problem.q_len = problem.kv_len = 131072;
  problem.head_dim = problem.value_dim = 16;
  EXPECT_THROW(dense_mask(dense_plan(problem)), Error);
  EXPECT_THROW(plan_from_mask(problem, {}, 128, 128), Error);
}

/// The pairs of listed blocks that the hard mask allows.
std::vector<std::uint8_t> block_pairs(const Problem& problem, std::int64_t block_q, std::int64_t block_k,
                                      const std::vector<std::uint8_t>& kept) {  // [B * H][rows][columns]
  std::vector<std::uint8_t> mask = testing::allowed_mask(problem);
  const std::int64_t rows = (problem.q_len + block_q - 1) / block_q;
  const std::int64_t columns = (problem.kv_len + block_k - 1) / block_k;
  for (std::int64_t p = 0; p < static_cast<std::int64_t>(mask.size()); ++p) {
    const std::int64_t key = p % problem.kv_len;
    const std::int64_t query = p / problem.kv_len % problem.q_len;
    const std::int64_t head = p / problem.kv_len / problem.q_len;
    if (kept[(head * rows + query / block_q) * columns + key / block_k] == 0) mask[p] = 0;
  }
  return mask;
}

Problem uniform_problem(Random& random) {
  Problem problem = testing::random_problem(random);
  while (problem.variable_length()) problem = testing::random_problem(random);
  return problem;
}

TEST(PlanFromBlockMask, HoldsThePairsOfItsBlocks) {
  Random random(32);
  for (int i = 0; i < 200; ++i) {
    const Problem problem = uniform_problem(random);
    const std::int64_t block_q = uniform(random, 1, 20);
    const std::int64_t block_k = uniform(random, 1, 40);
    const std::int64_t rows = (problem.q_len + block_q - 1) / block_q;
    const std::int64_t columns = (problem.kv_len + block_k - 1) / block_k;
    const bool shared = i % 3 == 0;
    const std::int64_t lists = shared ? 1 : problem.batch * problem.q_heads;
    std::vector<std::uint8_t> kept(static_cast<std::size_t>(problem.batch * problem.q_heads * rows * columns));
    std::vector<std::int32_t> counts(static_cast<std::size_t>(lists * rows));
    std::vector<std::int32_t> indices(static_cast<std::size_t>(lists * rows * columns), 9999);  // padding is never read
    std::vector<std::int32_t> full_counts(counts.size());
    std::vector<std::int32_t> full_indices(indices.size(), -1);
    for (std::int64_t list = 0; list < lists; ++list) {
      for (std::int64_t row = 0; row < rows; ++row) {
        for (std::int64_t column = columns - 1; column >= 0; --column) {  // unsorted lists are accepted
          if (testing::chance(random, 50)) continue;
          const std::int64_t at = list * rows + row;
          const std::int64_t last_key = std::min((column + 1) * block_k, problem.kv_len) - 1;
          const bool full = testing::allowed(problem, 0, row * block_q, last_key) && testing::chance(random, 70);
          auto& count = full ? full_counts[at] : counts[at];
          (full ? full_indices : indices)[at * columns + count++] = static_cast<std::int32_t>(column);
          for (std::int64_t h = 0; h < problem.batch * problem.q_heads; ++h) {
            if (shared || h == list) kept[(h * rows + row) * columns + column] = 1;
          }
        }
      }
    }
    const Plan plan = plan_from_block_mask(problem, block_q, block_k, counts, indices, full_counts, full_indices);
    SCOPED_TRACE(describe(plan));
    ASSERT_NO_THROW(validate(plan));
    EXPECT_EQ(dense_mask(plan), block_pairs(problem, block_q, block_k, kept));
  }
}

TEST(PlanFromBlockMask, RefusesBadLists) {
  Problem problem;
  problem.q_heads = 3;
  problem.q_len = problem.kv_len = 8;
  problem.head_dim = problem.value_dim = 16;
  problem.causal = true;
  using List = std::vector<std::int32_t>;
  const auto make = [&](const List& counts, const List& indices, const List& full_counts, const List& full_indices) {
    return plan_from_block_mask(problem, 4, 4, counts, indices, full_counts, full_indices);
  };
  EXPECT_NO_THROW(make({1, 1}, {0, 9, 1, 9}, {0, 1}, {9, 9, 0, 9}));
  EXPECT_THROW(make({1, 1, 1}, {0, 0, 0}, {}, {}), Error);  // neither [1,1,2] nor [1,3,2]
  EXPECT_THROW(make({1, 3}, {0, 9, 1, 9}, {}, {}), Error);  // count above the columns
  EXPECT_THROW(make({1, -1}, {0, 9, 1, 9}, {}, {}), Error);
  EXPECT_THROW(make({1, 1}, {0, 9, 2, 9}, {}, {}), Error);                // no such key block
  EXPECT_THROW(make({1, 2}, {0, 9, 1, 1}, {}, {}), Error);                // twice
  EXPECT_THROW(make({1, 1}, {0, 9, 0, 9}, {0, 1}, {9, 9, 0, 9}), Error);  // partial and full
  EXPECT_THROW(make({0, 0}, {9, 9, 9, 9}, {1, 0}, {0, 9, 9, 9}), Error);  // full on the diagonal
  EXPECT_THROW(make({1, 1}, {0, 9, 1}, {}, {}), Error);
}

TEST(PlanFromBsr, HoldsThePairsOfItsBlocks) {
  Random random(33);
  for (int i = 0; i < 100; ++i) {
    const Problem problem = uniform_problem(random);
    const std::int64_t block_q = uniform(random, 1, 20);
    const std::int64_t block_k = uniform(random, 1, 40);
    const std::int64_t rows = (problem.q_len + block_q - 1) / block_q;
    const std::int64_t columns = (problem.kv_len + block_k - 1) / block_k;
    std::vector<std::uint8_t> one;
    std::vector<std::int32_t> indptr = {0};
    std::vector<std::int32_t> indices;
    for (std::int64_t row = 0; row < rows; ++row) {
      for (std::int64_t column = 0; column < columns; ++column) {
        one.push_back(testing::chance(random, 40));
        if (one.back() != 0) indices.push_back(static_cast<std::int32_t>(column));
      }
      indptr.push_back(static_cast<std::int32_t>(indices.size()));
    }
    std::vector<std::uint8_t> kept;
    for (std::int64_t h = 0; h < problem.batch * problem.q_heads; ++h) kept.insert(kept.end(), one.begin(), one.end());
    const Plan plan = plan_from_bsr(problem, block_q, block_k, indptr, indices);
    SCOPED_TRACE(describe(plan));
    ASSERT_NO_THROW(validate(plan));
    EXPECT_EQ(dense_mask(plan), block_pairs(problem, block_q, block_k, kept));
  }
}

TEST(PlanFromBsr, RefusesBadPointers) {
  Problem problem;
  problem.q_len = problem.kv_len = 8;
  problem.head_dim = problem.value_dim = 16;
  using List = std::vector<std::int32_t>;
  const auto make = [&](const List& indptr, const List& indices) {
    return plan_from_bsr(problem, 4, 4, indptr, indices);
  };
  EXPECT_NO_THROW(make({0, 1, 2}, {1, 0}));
  EXPECT_THROW(make({0, 1}, {1}), Error);
  EXPECT_THROW(make({0, 2, 1}, {1}), Error);
  EXPECT_THROW(make({0, 1, 3}, {1, 0}), Error);
  EXPECT_THROW(make({1, 1, 2}, {1, 0}), Error);
  EXPECT_THROW(make({0, 1, 2}, {1, -1}), Error);
}

}  // namespace
}  // namespace tessera
