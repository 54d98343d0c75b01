#include "view/plan_map.h"

#include <gtest/gtest.h>

#include "plan/random_plans.h"

namespace tessera {
namespace {

using testing::Random;

/// The same shares, pair by pair, from the dense mask.
void expect_shares_of_mask(const Plan& plan, const PlanMap& map, std::int64_t sequence, std::int64_t head,
                           std::int64_t queries, std::int64_t keys, std::int64_t most_cells) {
  const Problem& problem = plan.problem;
  const auto mask = dense_mask(plan);
  const std::int64_t offset = problem.q_offset_of(sequence);
  const std::int64_t query_cell = (queries + most_cells - 1) / most_cells;
  const std::int64_t key_cell = (keys + most_cells - 1) / most_cells;
  std::vector<double> computed(static_cast<std::size_t>(map.rows() * map.columns()));
  std::vector<double> allowed(computed.size());
  for (std::int64_t q = 0; q < problem.q_len_of(sequence); ++q) {
    for (std::int64_t k = 0; k < problem.kv_len_of(sequence); ++k) {
      const std::int64_t cell = (offset + q) / query_cell * map.columns() + k / key_cell;
      if (!problem.causal || k <= offset + q) ++allowed[cell];
      const std::int64_t row = (problem.tensor_batch_of(sequence) * problem.q_heads + head) * problem.q_len +
                               problem.q_begin_of(sequence) + q;
      computed[cell] += mask[row * problem.kv_len + problem.kv_begin_of(sequence) + k];
    }
  }
  for (std::int64_t row = 0; row < map.rows(); ++row) {
    for (std::int64_t column = 0; column < map.columns(); ++column) {
      const std::int64_t cell = row * map.columns() + column;
      const double expected = allowed[cell] == 0 ? -1 : computed[cell] / allowed[cell];
      ASSERT_DOUBLE_EQ(map.share(row, column), expected) << testing::describe(plan) << " cell " << row << ' ' << column;
    }
  }
}

TEST(PlanMap, EqualsThePooledDenseMaskOfRandomPlans) {
  for (std::uint64_t seed = 0; seed < 200; ++seed) {
    SCOPED_TRACE(seed);
    Random random(seed);
    const Plan plan = testing::random_plan(random, testing::random_problem(random));
    const Problem& problem = plan.problem;
    const std::int64_t sequence = testing::uniform(random, 0, problem.batch - 1);
    const std::int64_t head = testing::uniform(random, 0, problem.q_heads - 1);
    const std::int64_t most_cells = testing::uniform(random, 1, 20);
    const std::int64_t offset = problem.q_offset_of(sequence);
    if (offset < 0) continue;
    const std::int64_t queries = std::max<std::int64_t>(1, offset + problem.q_len_of(sequence));
    const std::int64_t keys = std::max<std::int64_t>(1, problem.kv_len_of(sequence));
    PlanMap map(queries, keys, most_cells);
    map.add(plan, sequence, head);
    expect_shares_of_mask(plan, map, sequence, head, queries, keys, most_cells);
  }
}

TEST(PlanMap, ChunksAddUpToTheWhole) {
  Problem whole;
  whole.q_len = whole.kv_len = 300;
  whole.head_dim = whole.value_dim = 16;
  whole.causal = true;
  PlanMap at_once(300, 300, 16);
  at_once.add(dense_plan(whole, 64, 64), 0, 0);
  PlanMap in_chunks(300, 300, 16);
  for (std::int64_t begin = 0; begin < 300; begin += 70) {
    Problem chunk = whole;
    chunk.q_len = std::min<std::int64_t>(70, 300 - begin);
    chunk.kv_len = begin + chunk.q_len;
    in_chunks.add(dense_plan(chunk, 64, 64), 0, 0);
  }
  EXPECT_DOUBLE_EQ(in_chunks.density(), 1);
  for (std::int64_t row = 0; row < at_once.rows(); ++row) {
    for (std::int64_t column = 0; column < at_once.columns(); ++column) {
      EXPECT_DOUBLE_EQ(in_chunks.share(row, column), at_once.share(row, column));
      EXPECT_DOUBLE_EQ(at_once.share(row, column), column <= row ? 1 : -1);
    }
  }
}

TEST(PlanMap, OfACallHasItsQueriesAsRows) {
  for (std::uint64_t seed = 0; seed < 100; ++seed) {
    SCOPED_TRACE(seed);
    Random random(seed);
    testing::RandomPlanOptions options;
    options.query_orders = seed % 2 == 0;
    options.key_orders = seed % 3 == 0;
    const Plan plan = testing::random_plan(random, testing::random_problem(random), options);
    const Problem& problem = plan.problem;
    const std::int64_t sequence = testing::uniform(random, 0, problem.batch - 1);
    const std::int64_t head = testing::uniform(random, 0, problem.q_heads - 1);
    const std::int64_t cell = testing::uniform(random, 1, 40);
    PlanMap map = PlanMap::of_call(problem, sequence, cell);
    map.add(plan, sequence, head);
    const auto mask = dense_mask(plan);
    std::vector<std::int64_t> computed(static_cast<std::size_t>(map.rows() * map.columns()), 0);
    std::vector<std::int64_t> allowed(computed.size(), 0);
    for (std::int64_t q = 0; q < problem.q_len_of(sequence); ++q) {
      for (std::int64_t k = 0; k < problem.kv_len_of(sequence); ++k) {
        const std::int64_t row = (problem.tensor_batch_of(sequence) * problem.q_heads + head) * problem.q_len +
                                 problem.q_begin_of(sequence) + q;
        const std::int64_t at = q / cell * map.columns() + k / cell;
        computed[at] += mask[row * problem.kv_len + problem.kv_begin_of(sequence) + k];
        allowed[at] += !problem.causal || k <= problem.q_offset_of(sequence) + q ? 1 : 0;
      }
    }
    for (std::int64_t row = 0; row < map.rows(); ++row) {
      for (std::int64_t column = 0; column < map.columns(); ++column) {
        ASSERT_EQ(map.computed(row, column), computed[row * map.columns() + column]) << row << ' ' << column;
        ASSERT_EQ(map.allowed(row, column), allowed[row * map.columns() + column]) << row << ' ' << column;
        ASSERT_EQ(map.pooled(row, column) + map.corrected(row, column), 0);
      }
    }
  }
}

TEST(PlanMap, DerivedSourcesStandForTheirKeys) {
  Problem problem;
  problem.q_len = problem.kv_len = 32;
  problem.head_dim = problem.value_dim = 16;
  PlanBuilder builder(problem, 16, 8, 1, 1);
  const std::uint16_t means = builder.add_source({"mean of 4", 8, false});
  const std::uint16_t tiles = builder.add_source({"tile means", 4, false});
  const std::uint16_t sampled = builder.add_source({"sampled keys", 5, true});
  builder.tiles(0, 1);                           // keys 0 to 7
  builder.run(2, 3, EntryMask::none, 0, means);  // keys 8 to 19
  builder.run(3, 1, EntryMask::none, 0, tiles);  // keys 24 to 31
  builder.end_row();
  builder.tiles(1, 1);
  builder.run(0, 5, EntryMask::none, 0, sampled);
  builder.end_row();
  PlanMap map = PlanMap::of_call(problem, 0, 8);
  map.add(std::move(builder).finish(), 0, 0);
  const auto row_of = [&](std::int64_t row, auto pairs) {
    std::vector<std::int64_t> values;
    for (std::int64_t column = 0; column < 4; ++column) values.push_back((map.*pairs)(row, column));
    return values;
  };
  using Row = std::vector<std::int64_t>;
  for (const std::int64_t row : {0, 1}) {
    EXPECT_EQ(row_of(row, &PlanMap::computed), (Row{64, 0, 0, 0}));
    EXPECT_EQ(row_of(row, &PlanMap::pooled), (Row{0, 64, 32, 0}));
    EXPECT_EQ(row_of(row, &PlanMap::corrected), (Row{0, 0, 0, 64}));
  }
  EXPECT_EQ(row_of(2, &PlanMap::computed), (Row{0, 64, 0, 0}));
  EXPECT_EQ(row_of(2, &PlanMap::pooled), (Row{0, 0, 0, 0}));
  EXPECT_EQ(row_of(2, &PlanMap::corrected), (Row{64, 0, 64, 64}));
}

TEST(PlanMap, RefusesWhatDoesNotFit) {
  Problem problem;
  problem.q_len = problem.kv_len = 32;
  problem.head_dim = problem.value_dim = 16;
  const Plan plan = dense_plan(problem, 16, 16);
  EXPECT_THROW(PlanMap(0, 32), Error);
  EXPECT_THROW(PlanMap(32, 32, 0), Error);
  PlanMap map(31, 32);
  EXPECT_THROW(map.add(plan, 0, 0), Error);
  PlanMap fitting(32, 32);
  EXPECT_THROW(fitting.add(plan, 1, 0), Error);
  EXPECT_THROW(fitting.add(plan, 0, 1), Error);
}

}  // namespace
}  // namespace tessera
