// Set algebra, coverage, transposition and statistics of random plans against boolean arithmetic on dense masks.
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <set>

#include "plan/random_plans.h"
#include "tessera/plan.h"

namespace tessera {
namespace {

using testing::describe;
using testing::Random;
using testing::random_plan;
using testing::random_problem;
using Mask = std::vector<std::uint8_t>;

template <class Operation>
Mask elementwise(const Mask& a, const Mask& b, const Operation& operation) {
  Mask result(a.size());
  std::transform(a.begin(), a.end(), b.begin(), result.begin(),
                 [&](bool x, bool y) { return static_cast<std::uint8_t>(operation(x, y)); });
  return result;
}

struct Pair {
  Plan a;
  Plan b;
};

/// Operands that set algebra accepts.
Pair random_pair(Random& random, bool orders) {
  const Problem problem = random_problem(random);
  const std::int64_t tile_q = testing::uniform(random, 1, 20);
  if (!orders) return {random_plan(random, problem, {tile_q}), random_plan(random, problem, {tile_q})};
  // Operands must share their orders: b is built in the frame of a, from windows.
  Pair pair{random_plan(random, problem, {tile_q, true, true}), {}};
  PlanBuilder builder(problem, tile_q, 16, pair.a.plan_heads, pair.a.plan_sequences);
  const std::int64_t window = builder.add_band({testing::uniform(random, 0, 50), 0});
  for (std::int64_t block = 0; block < builder.blocks(); ++block) {
    builder.set_query_order(block, pair.a.query_order[block]);
    builder.set_key_order(block, pair.a.key_order[block]);
    const std::int64_t keys = problem.kv_len_of(pair.a.sequence_of_block(block));
    for (std::int64_t tile = 0; tile < builder.query_tiles(block); ++tile) {
      const std::int64_t cut = testing::uniform(random, 0, keys);
      builder.run(0, cut, EntryMask::band, 0);
      builder.run(cut, keys - cut, EntryMask::band, window);
      builder.end_row();
    }
  }
  pair.b = std::move(builder).finish();
  return pair;
}

class Algebra : public ::testing::TestWithParam<bool> {};

TEST_P(Algebra, UnionIsTheBooleanOr) {
  Random random(11);
  for (int i = 0; i < 250; ++i) {
    const Pair pair = random_pair(random, GetParam());
    SCOPED_TRACE(describe(pair.a) + " | " + describe(pair.b));
    const Plan result = unite(pair.a, pair.b);
    ASSERT_NO_THROW(validate(result));
    EXPECT_EQ(dense_mask(result), elementwise(dense_mask(pair.a), dense_mask(pair.b), std::logical_or<>()));
  }
}

TEST_P(Algebra, IntersectionIsTheBooleanAnd) {
  Random random(12);
  for (int i = 0; i < 250; ++i) {
    const Pair pair = random_pair(random, GetParam());
    SCOPED_TRACE(describe(pair.a) + " | " + describe(pair.b));
    const Plan result = intersect(pair.a, pair.b);
    ASSERT_NO_THROW(validate(result));
    EXPECT_EQ(dense_mask(result), elementwise(dense_mask(pair.a), dense_mask(pair.b), std::logical_and<>()));
  }
}

/// Rows of the hard mask whose query the plan covers: outside a query subset there is no complement.
Mask allowed_in(const Plan& plan) {
  Mask allowed = testing::allowed_mask(plan.problem);
  const Problem& problem = plan.problem;
  for (std::int64_t s = 0; s < problem.batch; ++s) {
    for (std::int64_t h = 0; h < problem.q_heads; ++h) {
      const std::int64_t block = plan.block_of(s, h);
      if (plan.query_order.empty() || plan.query_order[block].empty()) continue;
      const std::set<std::int32_t> present(plan.query_order[block].begin(), plan.query_order[block].end());
      for (std::int64_t q = 0; q < problem.q_len_of(s); ++q) {
        if (present.contains(static_cast<std::int32_t>(q))) continue;
        const std::int64_t row =
            (problem.tensor_batch_of(s) * problem.q_heads + h) * problem.q_len + problem.q_begin_of(s) + q;
        std::fill_n(allowed.begin() + row * problem.kv_len + problem.kv_begin_of(s), problem.kv_len_of(s), 0);
      }
    }
  }
  return allowed;
}

TEST_P(Algebra, ComplementIsWhatIsLeft) {
  Random random(13);
  for (int i = 0; i < 250; ++i) {
    const Plan plan = random_pair(random, GetParam()).a;
    SCOPED_TRACE(describe(plan));
    const Plan rest = complement(plan);
    ASSERT_NO_THROW(validate(rest));
    EXPECT_EQ(dense_mask(rest),
              elementwise(allowed_in(plan), dense_mask(plan), [](bool all, bool p) { return all && !p; }));
  }
}

TEST_P(Algebra, CoverageIsTheShareOfCommonPairs) {
  Random random(14);
  for (int i = 0; i < 250; ++i) {
    const Pair pair = random_pair(random, GetParam());
    SCOPED_TRACE(describe(pair.a) + " | " + describe(pair.b));
    const Mask a = dense_mask(pair.a);
    const Mask b = dense_mask(pair.b);
    const Mask both = elementwise(a, b, std::logical_and<>());
    const double reference = std::accumulate(b.begin(), b.end(), 0.0);
    const double common = std::accumulate(both.begin(), both.end(), 0.0);
    EXPECT_DOUBLE_EQ(coverage(pair.a, pair.b), reference == 0 ? 1 : common / reference);
  }
}

INSTANTIATE_TEST_SUITE_P(Orders, Algebra, ::testing::Bool(),
                         [](const auto& with) { return with.param ? "Reordered" : "InOrder"; });

TEST(Coverage, ComparesPlansOfDifferentTilesAndOrders) {
  Random random(15);
  for (int i = 0; i < 150; ++i) {
    const Problem problem = random_problem(random);
    const Plan a = random_plan(random, problem, {0, i % 2 == 0, i % 3 == 0});
    const Plan b = random_plan(random, problem, {0, i % 5 == 0, i % 4 == 0});
    SCOPED_TRACE(describe(a) + " | " + describe(b));
    const Mask reference = dense_mask(b);
    const Mask both = elementwise(dense_mask(a), reference, std::logical_and<>());
    const double pairs = std::accumulate(reference.begin(), reference.end(), 0.0);
    const double common = std::accumulate(both.begin(), both.end(), 0.0);
    EXPECT_DOUBLE_EQ(coverage(a, b), pairs == 0 ? 1 : common / pairs);
  }
}

TEST(Algebra, KeepsRunsWhereMasksAllowIt) {
  Problem problem;
  problem.q_len = problem.kv_len = 4096;
  problem.head_dim = problem.value_dim = 64;
  problem.causal = true;
  const Plan dense = dense_plan(problem, 128, 128);
  const Plan united = unite(dense, dense);
  EXPECT_LE(united.entries.size(), 2 * dense.entries.size());
  EXPECT_TRUE(united.mask_words.empty() && united.tokens.empty());
  EXPECT_TRUE(complement(dense).entries.empty());
  const Plan nothing = complement(dense);
  const Plan again = complement(nothing);
  EXPECT_TRUE(again.mask_words.empty());
  EXPECT_EQ(statistics(again).planned_pairs, statistics(dense).planned_pairs);
}

TEST(Algebra, ComplementOfAWindowNeedsBitsOnlyAtItsEdge) {
  Problem problem;
  problem.q_len = problem.kv_len = 4096;
  problem.head_dim = problem.value_dim = 64;
  problem.causal = true;
  PlanBuilder builder(problem, 128, 128, 1, 1);
  const std::int64_t window = builder.add_band({1000, 0});
  for (std::int64_t tile = 0; tile < builder.query_tiles(0); ++tile) {
    builder.run(0, (tile + 1) * 128, EntryMask::band, window);
    builder.end_row();
  }
  const Plan plan = std::move(builder).finish();
  const Plan rest = complement(plan);
  EXPECT_EQ(statistics(rest).planned_pairs + statistics(plan).planned_pairs, problem.allowed_pairs());
  // The window's left edge crosses each query tile over at most 128 keys: three words a query.
  EXPECT_LE(rest.mask_words.size(), 4096U * 3U);
}

TEST(Algebra, KeepsDerivedSources) {
  Random random(16);
  for (int i = 0; i < 50; ++i) {
    const Problem problem = random_problem(random);
    const Plan a = random_plan(random, problem, {8, false, false, true});
    const Plan b = random_plan(random, problem, {8, false, false, i % 2 == 0});
    const Plan result = unite(a, b);
    ASSERT_NO_THROW(validate(result));
    EXPECT_EQ(result.sources.size(), 3U);
    EXPECT_EQ(dense_mask(result), elementwise(dense_mask(a), dense_mask(b), std::logical_or<>()));
    EXPECT_THROW(intersect(a, b), Error);
    EXPECT_THROW(complement(a), Error);
  }
}

TEST(Algebra, RefusesPlansOfDifferentFrames) {
  Problem problem;
  problem.q_len = problem.kv_len = 64;
  problem.head_dim = problem.value_dim = 16;
  const Plan a = dense_plan(problem, 16, 16);
  EXPECT_THROW(unite(a, dense_plan(problem, 32, 16)), Error);
  EXPECT_NO_THROW(unite(a, dense_plan(problem, 16, 32)));
  Problem other = problem;
  other.causal = true;
  EXPECT_THROW(intersect(a, dense_plan(other, 16, 16)), Error);
  Plan reordered = a;
  reordered.key_order = {{}};
  EXPECT_NO_THROW(unite(a, reordered));
  reordered.key_order[0].resize(64);
  std::iota(reordered.key_order[0].rbegin(), reordered.key_order[0].rend(), 0);
  EXPECT_THROW(unite(a, reordered), Error);
}

TEST(Transpose, ListsTheQueryTilesOfEachKeyTile) {
  Random random(17);
  for (int i = 0; i < 100; ++i) {
    const Problem problem = random_problem(random);
    const Plan plan = random_plan(random, problem, {0, i % 2 == 0, i % 3 == 0, i % 5 == 0});
    SCOPED_TRACE(describe(plan));
    const PlanTranspose result = transpose(plan);
    ASSERT_EQ(result.offsets.back(), static_cast<std::int64_t>(result.rows.size()));
    for (std::int64_t block = 0; block < plan.plan_heads * plan.plan_sequences; ++block) {
      std::set<std::pair<std::int64_t, std::int64_t>> expected;  // (key tile, query tile)
      for (std::int64_t row = plan.row_begin[block]; row < plan.row_begin[block + 1]; ++row) {
        for (const PlanEntry& entry : plan.row(row)) {
          if (entry.source != 0) continue;
          const Plan::KeyRange keys = plan.keys_of(entry, block);
          for (std::int64_t k = 0; k < keys.count; ++k) {
            const std::int64_t key = entry.kind == EntryKind::gather ? plan.tokens[keys.begin + k] : keys.begin + k;
            expected.insert({key / plan.tile_k, row - plan.row_begin[block]});
          }
        }
      }
      std::vector<std::pair<std::int64_t, std::int64_t>> listed;
      for (std::int64_t t = result.key_tile_begin[block]; t < result.key_tile_begin[block + 1]; ++t) {
        for (std::int64_t r = result.offsets[t]; r < result.offsets[t + 1]; ++r) {
          listed.emplace_back(t - result.key_tile_begin[block], result.rows[r]);
        }
      }
      EXPECT_TRUE(std::ranges::equal(listed, expected));
    }
  }
}

TEST(Statistics, AgreeWithTheDenseMask) {
  Random random(18);
  for (int i = 0; i < 250; ++i) {
    const Problem problem = random_problem(random);
    const Plan plan = random_plan(random, problem, {0, i % 3 == 0, i % 4 == 0});
    SCOPED_TRACE(describe(plan));
    const PlanStatistics numbers = statistics(plan);
    const Mask mask = dense_mask(plan);
    const Mask allowed = testing::allowed_mask(problem);
    EXPECT_EQ(numbers.planned_pairs, std::accumulate(mask.begin(), mask.end(), std::int64_t{0}));
    EXPECT_EQ(numbers.allowed_pairs, std::accumulate(allowed.begin(), allowed.end(), std::int64_t{0}));
    EXPECT_GE(numbers.executed_pairs, numbers.planned_pairs);
    double sum = 0;
    for (const double density : numbers.head_density) sum += density;
    EXPECT_NEAR(sum / static_cast<double>(problem.q_heads), numbers.density, 1e-12);

    // Keys touched: the union over each GQA group of the keys that the row's entries name.
    std::int64_t touched = 0;
    for (std::int64_t s = 0; s < problem.batch; ++s) {
      for (std::int64_t kv = 0; kv < problem.kv_heads; ++kv) {
        std::set<std::pair<std::int64_t, std::int64_t>> keys;  // (query tile, key)
        for (std::int64_t h = kv * problem.group(); h < (kv + 1) * problem.group(); ++h) {
          const std::int64_t block = plan.block_of(s, h);
          for (std::int64_t row = plan.row_begin[block]; row < plan.row_begin[block + 1]; ++row) {
            for (const PlanEntry& entry : plan.row(row)) {
              const Plan::KeyRange range = plan.keys_of(entry, block);
              for (std::int64_t k = 0; k < range.count; ++k) {
                std::int64_t key = entry.kind == EntryKind::gather ? plan.tokens[range.begin + k] : range.begin + k;
                if (!plan.key_order.empty() && !plan.key_order[block].empty()) key = plan.key_order[block][key];
                keys.insert({row - plan.row_begin[block], key});
              }
            }
          }
        }
        touched += static_cast<std::int64_t>(keys.size());
      }
    }
    EXPECT_DOUBLE_EQ(numbers.kv_bytes, static_cast<double>(touched) * 2 * (16 + 24));
  }
}

TEST(Statistics, AreZeroForAnEmptyProblem) {
  Problem problem;
  problem.head_dim = problem.value_dim = 16;
  const PlanStatistics numbers = statistics(dense_plan(problem));
  EXPECT_EQ(numbers.density, 0);
  EXPECT_EQ(numbers.allowed_pairs, 0);
}

TEST(Explain, SaysWhatAPersonAsks) {
  Problem problem;
  problem.q_heads = 4;
  problem.kv_heads = 2;
  problem.q_len = problem.kv_len = 1024;
  problem.head_dim = problem.value_dim = 64;
  problem.causal = true;
  const std::string text = explain(dense_plan(problem));
  for (const char* part : {"density 100.00% planned", "4 query heads on 2 kv heads", "8 entries", "causal", "FLOP"}) {
    EXPECT_NE(text.find(part), std::string::npos) << part << " in\n" << text;
  }
}

}  // namespace
}  // namespace tessera
