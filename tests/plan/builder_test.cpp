// Building: rows in order, dense attention as a plan, joining of blocks.
#include <gtest/gtest.h>

#include "plan/random_plans.h"
#include "tessera/plan.h"

namespace tessera {
namespace {

using testing::describe;
using testing::Random;
using testing::uniform;

Problem small_problem() {
  Problem problem;
  problem.q_len = 10;
  problem.kv_len = 20;
  problem.head_dim = 16;
  problem.value_dim = 16;
  return problem;
}

TEST(PlanBuilder, RefusesToFinishWithRowsMissing) {
  PlanBuilder builder(small_problem(), 4, 4, 1, 1);
  builder.end_row();
  EXPECT_THROW(std::move(builder).finish(), Error);
}

TEST(PlanBuilder, RefusesHeadsAndSequencesThatDoNotDivideTheProblem) {
  Problem problem = small_problem();
  problem.q_heads = 6;
  problem.kv_heads = 2;
  problem.batch = 3;
  EXPECT_THROW(PlanBuilder(problem, 4, 4, 3, 1), Error);
  EXPECT_THROW(PlanBuilder(problem, 4, 4, 1, 2), Error);
  EXPECT_THROW(PlanBuilder(problem, 0, 4, 1, 1), Error);
  EXPECT_THROW(PlanBuilder(problem, 4, -1, 1, 1), Error);
  EXPECT_NO_THROW(PlanBuilder(problem, 4, 4, 2, 3));
}

TEST(PlanBuilder, DropsEmptyEntriesAndSharesEqualBands) {
  PlanBuilder builder(small_problem(), 16, 4, 1, 1);
  EXPECT_EQ(builder.add_band({-1, 0}), 0);
  EXPECT_EQ(builder.add_band({3, 0}), builder.add_band({3, 0}));
  EXPECT_THROW(builder.add_band({-2, 0}), Error);
  builder.run(5, 0);
  builder.end_row();
  EXPECT_TRUE(std::move(builder).finish().entries.empty());
}

TEST(DensePlan, HoldsExactlyTheAllowedPairs) {
  Random random(1);
  for (int i = 0; i < 200; ++i) {
    const Problem problem = testing::random_problem(random);
    const Plan plan = dense_plan(problem, uniform(random, 1, 20), uniform(random, 1, 40));
    SCOPED_TRACE(describe(plan));
    EXPECT_NO_THROW(validate(plan));
    EXPECT_EQ(dense_mask(plan), testing::allowed_mask(problem));
    const PlanStatistics numbers = statistics(plan);
    EXPECT_EQ(numbers.planned_pairs, numbers.allowed_pairs);
    for (std::int64_t row = 0; row < plan.rows(); ++row) EXPECT_LE(plan.row(row).size(), 1);
  }
}

TEST(DensePlan, MasksOnlyTilesOnTheDiagonal) {
  Problem problem = small_problem();
  problem.causal = true;
  problem.q_offset = 15;
  const Plan plan = dense_plan(problem, 4, 4);
  ASSERT_EQ(plan.rows(), 3);
  EXPECT_EQ(plan.row(0)[0], (PlanEntry{0, 19, EntryKind::run, EntryMask::band, 0, 0}));
  EXPECT_EQ(plan.row(1)[0], (PlanEntry{0, 20, EntryKind::run, EntryMask::none, 0, 0}));
}

TEST(ConcatenateBlocks, EqualsThePlanBuiltAtOnce) {
  Random random(2);
  for (int i = 0; i < 60; ++i) {
    const Problem problem = testing::random_problem(random);
    testing::RandomPlanOptions options;
    options.query_orders = i % 3 == 0;
    options.key_orders = i % 3 == 1;
    options.derived_sources = i % 4 == 0;
    const Plan whole = testing::random_plan(random, problem, options);
    SCOPED_TRACE(describe(whole));
    std::vector<Plan> parts;
    for (std::int64_t block = 0; block < whole.plan_heads * whole.plan_sequences; ++block) {
      PlanBuilder part =
          PlanBuilder::for_block(problem, whole.tile_q, whole.tile_k, whole.plan_heads, whole.plan_sequences, block);
      for (std::size_t s = 1; s < whole.sources.size(); ++s) part.add_source(whole.sources[s]);
      if (!whole.query_order.empty()) part.set_query_order(block, whole.query_order[block]);
      if (!whole.key_order.empty()) part.set_key_order(block, whole.key_order[block]);
      for (std::int64_t r = whole.row_begin[block]; r < whole.row_begin[block + 1]; ++r) {
        const std::int64_t rows =
            std::min(whole.tile_q, whole.queries_of(block) - (r - whole.row_begin[block]) * whole.tile_q);
        for (const PlanEntry& entry : whole.row(r)) {
          std::int64_t mask_index = entry.mask_index;
          if (entry.mask == EntryMask::band) mask_index = part.add_band(whole.bands[entry.mask_index]);
          if (entry.mask == EntryMask::bitmask) {
            const std::int64_t keys = whole.keys_of(entry, block).count;
            mask_index = part.add_mask(
                {whole.mask_words.data() + entry.mask_index, static_cast<std::size_t>(rows * ((keys + 63) / 64))});
          }
          if (entry.kind == EntryKind::tile) {
            part.tiles(entry.begin, entry.count, entry.mask, mask_index, entry.source);
          } else if (entry.kind == EntryKind::run) {
            part.run(entry.begin, entry.count, entry.mask, mask_index, entry.source);
          } else {
            const std::int64_t tokens =
                part.add_tokens({whole.tokens.data() + entry.begin, static_cast<std::size_t>(entry.count)});
            part.gather(tokens, entry.count, entry.mask, mask_index, entry.source);
          }
        }
        part.end_row();
      }
      parts.push_back(std::move(part).finish());
    }
    const Plan joined = concatenate_blocks(problem, whole.plan_heads, whole.plan_sequences, parts);
    EXPECT_NO_THROW(validate(joined));
    EXPECT_EQ(dense_mask(joined), dense_mask(whole));
    EXPECT_EQ(joined.row_begin, whole.row_begin);
    EXPECT_EQ(joined.entry_begin, whole.entry_begin);
  }
}

TEST(ConcatenateBlocks, RefusesPartsThatDoNotFit) {
  const Problem problem = small_problem();
  std::vector<Plan> parts = {dense_plan(problem, 4, 4), dense_plan(problem, 4, 4)};
  EXPECT_THROW(concatenate_blocks(problem, 1, 1, parts), Error);
  parts.pop_back();
  EXPECT_NO_THROW(concatenate_blocks(problem, 1, 1, parts));
  Problem other = problem;
  other.q_len = 17;
  EXPECT_THROW(concatenate_blocks(other, 1, 1, parts), Error);
}

TEST(RandomPlans, AreValid) {
  Random random(3);
  for (int i = 0; i < 300; ++i) {
    const Problem problem = testing::random_problem(random);
    const Plan plan = testing::random_plan(random, problem, {0, i % 2 == 0, i % 3 == 0, i % 5 == 0});
    SCOPED_TRACE(describe(plan));
    EXPECT_NO_THROW(validate(plan));
  }
}

}  // namespace
}  // namespace tessera
