#include "support/bare_plan.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>

namespace tessera::cli {
namespace {

Problem problem_of_lengths(std::int64_t queries, std::int64_t keys, bool causal) {
  Problem problem;
  problem.q_heads = 4;
  problem.kv_heads = 2;
  problem.q_len = queries;
  problem.kv_len = keys;
  problem.head_dim = problem.value_dim = 16;
  problem.causal = causal;
  return problem;
}

TEST(BarePlan, IsValidForEveryShape) {
  for (const char* spec : {"dense", "window:size=5,tile=8", "random-block:tile=16,density=0.3",
                           "random-block:density=1", "random-block:tile=7,density=0", "random-token:tile=9,density=0.5",
                           "random-token:keys=3", "random-token:density=1", "per-query:blocks=3,block=8"}) {
    for (const bool causal : {false, true}) {
      for (const auto& [queries, keys] : {std::pair{1, 1}, {50, 50}, {64, 64}, {7, 65}, {1, 33}}) {
        SCOPED_TRACE(testing::Message() << spec << " causal " << causal << " " << queries << " x " << keys);
        const BarePlan bare = make_bare_plan(spec, problem_of_lengths(queries, keys, causal));
        EXPECT_NO_THROW(validate(bare.plan));
        EXPECT_EQ(statistics(bare.plan).empty_rows, 0);
      }
    }
  }
}

TEST(BarePlan, HasTheDensityAskedFor) {
  const Problem whole = problem_of_lengths(2048, 2048, false);
  const Problem causal = problem_of_lengths(2048, 2048, true);
  const auto density = [](const char* spec, const Problem& problem) {
    return statistics(make_bare_plan(spec, problem).plan).density;
  };
  EXPECT_NEAR(density("random-block:tile=16,density=0.1", whole), 0.1, 0.002);
  EXPECT_NEAR(density("random-block:tile=16,density=0.1", causal), 0.1, 0.005);
  EXPECT_NEAR(density("random-token:tile=32,density=0.1", whole), 0.1, 0.002);
  EXPECT_NEAR(density("random-token:tile=32,density=0.1", causal), 0.1, 0.005);
  EXPECT_DOUBLE_EQ(density("per-query:blocks=4,block=64", whole), 4.0 * 64 / 2048);
  EXPECT_DOUBLE_EQ(density("random-block:density=1", causal), 1);
  EXPECT_DOUBLE_EQ(density("window:size=2048", causal), 1);
}

TEST(BarePlan, DiffersByHeadAndSeedAlone) {
  const Problem problem = problem_of_lengths(256, 256, true);
  const Plan plan = make_bare_plan("random-block:tile=16,density=0.2", problem).plan;
  EXPECT_EQ(plan, make_bare_plan("random-block:tile=16,density=0.2,seed=1", problem).plan);
  EXPECT_FALSE(plan == make_bare_plan("random-block:tile=16,density=0.2,seed=2", problem).plan);
  ASSERT_EQ(plan.plan_heads, 4);
  std::set<std::int64_t> first_heads;
  for (std::int64_t head = 0; head < 4; ++head) {
    std::int64_t sum = 0;
    for (std::int64_t row = plan.row_begin[head]; row < plan.row_begin[head + 1]; ++row) {
      for (const PlanEntry& entry : plan.row(row)) sum = sum * 31 + entry.begin;
    }
    first_heads.insert(sum);
  }
  EXPECT_EQ(first_heads.size(), 4U);
}

TEST(BarePlan, DecodeSharesTokensInTheGroup) {
  const Plan plan = make_bare_plan("random-token:keys=8", problem_of_lengths(1, 100, true)).plan;
  EXPECT_EQ(plan.plan_heads, 2);
  EXPECT_EQ(statistics(plan).planned_pairs, 4 * 8);
}

}  // namespace
}  // namespace tessera::cli
