// validate() finds each fault that a plan can have; found by breaking valid plans one field at a time.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>

#include "plan/random_plans.h"
#include "tessera/plan.h"

namespace tessera {
namespace {

using ::testing::HasSubstr;

Problem causal_problem() {
  Problem problem;
  problem.q_heads = 2;
  problem.kv_heads = 1;
  problem.q_len = 20;
  problem.kv_len = 50;  // query 0 sits on key 30
  problem.head_dim = problem.value_dim = 16;
  problem.causal = true;
  return problem;
}

/// Tiles of 8 x 16: a whole tile, a run under the causal band, a gather and a run under a bitmask, and an empty row.
Plan valid_plan() {
  PlanBuilder builder(causal_problem(), 8, 16, 1, 1);
  const std::int64_t source = builder.add_source({"sampled", 12, true});
  builder.tiles(0, 1);
  builder.run(20, 18, EntryMask::band);
  builder.end_row();
  builder.gather(builder.add_tokens(std::vector<std::int32_t>{1, 5, 38}), 3);
  const std::vector<std::uint64_t> words(8, 0x3FF);
  builder.run(10, 12, EntryMask::bitmask, builder.add_mask(words));
  builder.gather(builder.add_tokens(std::vector<std::int32_t>{2, 2, 11}), 3, EntryMask::none, 0,
                 static_cast<std::uint16_t>(source));
  builder.end_row();
  builder.end_row();
  return std::move(builder).finish();
}

struct Fault {
  std::string what;
  std::function<void(Plan&)> make;
  std::string message;
};

class BadPlan : public ::testing::TestWithParam<Fault> {};

TEST_P(BadPlan, IsRefused) {
  Plan plan = valid_plan();
  ASSERT_NO_THROW(validate(plan));
  GetParam().make(plan);
  try {
    validate(plan);
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), HasSubstr(GetParam().message));
  }
}

constexpr std::int64_t kHuge = std::int64_t{1} << 62;

INSTANTIATE_TEST_SUITE_P(
    Table, BadPlan,
    ::testing::Values(
        Fault{"problem", [](Plan& p) { p.problem.head_dim = 0; }, "head_dim"},
        Fault{"tile_q", [](Plan& p) { p.tile_q = 0; }, "tile_q"},
        Fault{"tile_k", [](Plan& p) { p.tile_k = -16; }, "tile_k"},
        Fault{"plan_heads", [](Plan& p) { p.plan_heads = 3; }, "plan_heads"},
        Fault{"plan_sequences", [](Plan& p) { p.plan_sequences = 2; }, "plan_sequences"},
        Fault{"row_begin_size", [](Plan& p) { p.plan_heads = 2; }, "row_begin has 2"},
        Fault{"row_begin_empty", [](Plan& p) { p.row_begin.clear(); }, "row_begin"},
        Fault{"row_begin_start", [](Plan& p) { p.row_begin[0] = 1; }, "row_begin[0]"},
        Fault{"row_begin_tiles", [](Plan& p) { p.row_begin[1] = 4; }, "expected 3 query tiles"},
        Fault{"entry_begin_empty", [](Plan& p) { p.entry_begin.clear(); }, "entry_begin"},
        Fault{"entry_begin_size", [](Plan& p) { p.entry_begin.push_back(5); }, "entry_begin"},
        Fault{"entry_begin_start", [](Plan& p) { p.entry_begin[0] = -1; }, "entry_begin[0]"},
        Fault{"entry_begin_decreases", [](Plan& p) { p.entry_begin[1] = kHuge; }, "decreases"},
        Fault{"entry_begin_end", [](Plan& p) { p.entry_begin.back() = 6; }, "ends at 6"},
        Fault{"entry_count_zero", [](Plan& p) { p.entries[1].count = 0; }, "out of range"},
        Fault{"entry_count_negative", [](Plan& p) { p.entries[1].count = -1; }, "out of range"},
        Fault{"tile_out_of_range", [](Plan& p) { p.entries[0].begin = 4; }, "out of range"},
        Fault{"tile_begin_huge", [](Plan& p) { p.entries[0].begin = kHuge; }, "out of range"},
        Fault{"run_negative", [](Plan& p) { p.entries[1].begin = -1; }, "out of range"},
        Fault{"run_beyond_keys", [](Plan& p) { p.entries[1].begin = 33; }, "out of range"},
        Fault{"gather_beyond_pool", [](Plan& p) { p.entries[2].begin = 4; }, "out of range"},
        Fault{"gather_negative", [](Plan& p) { p.entries[2].begin = -3; }, "out of range"},
        Fault{"unknown_kind", [](Plan& p) { p.entries[0].kind = static_cast<EntryKind>(3); }, "unknown"},
        Fault{"unknown_mask", [](Plan& p) { p.entries[0].mask = static_cast<EntryMask>(9); }, "unknown"},
        Fault{"unknown_source", [](Plan& p) { p.entries[0].source = 2; }, "source 2"},
        Fault{"band_index", [](Plan& p) { p.entries[1].mask_index = 1; }, "band 1"},
        Fault{"band_index_negative", [](Plan& p) { p.entries[1].mask_index = -1; }, "band -1"},
        Fault{"band_of_derived_source", [](Plan& p) { p.entries[4].mask = EntryMask::band; }, "needs positions"},
        Fault{"bitmask_beyond_pool", [](Plan& p) { p.entries[3].mask_index = 1; }, "bitmask at 1"},
        Fault{"bitmask_negative", [](Plan& p) { p.entries[3].mask_index = -1; }, "bitmask at -1"},
        Fault{"bitmask_tail", [](Plan& p) { p.mask_words[7] = 1 << 12; }, "beyond its 12 keys"},
        Fault{"tokens_descend", [](Plan& p) { p.tokens[1] = 0; }, "ascend"},
        Fault{"tokens_repeat", [](Plan& p) { p.tokens[1] = 1; }, "ascend"},
        Fault{"tokens_negative", [](Plan& p) { p.tokens[0] = -1; }, "out of range"},
        Fault{"tokens_beyond_keys", [](Plan& p) { p.tokens[2] = 50; }, "out of range"},
        Fault{"tokens_beyond_derived_keys", [](Plan& p) { p.tokens[5] = 12; }, "out of range"},
        Fault{"derived_tokens_descend", [](Plan& p) { p.tokens[4] = 1; }, "ascend"},
        Fault{"key_after_query", [](Plan& p) { p.entries[0].begin = 1; p.entries[1].mask = EntryMask::none; },
              "comes after query"},
        Fault{"gathered_key_after_query", [](Plan& p) { p.tokens[2] = 39; }, "key 39 comes after query 38"},
        Fault{"band_reaches_ahead", [](Plan& p) { p.bands.push_back({5, 1}); p.entries[1].mask_index = 1; },
              "reaches keys after the query"},
        Fault{"bit_after_query", [](Plan& p) { p.entries[3].begin = 38; }, "comes after query"},
        Fault{"runs_overlap", [](Plan& p) { p.entries[1].begin = 15; }, "cover the same pair"},
        Fault{"gather_overlaps_run", [](Plan& p) { p.tokens[1] = 10; }, "cover the same pair"},
        Fault{"bands_missing", [](Plan& p) { p.bands.clear(); }, "bands[0]"},
        Fault{"band_zero_not_causal", [](Plan& p) { p.bands[0] = {1, 0}; }, "bands[0]"},
        Fault{"band_negative", [](Plan& p) { p.bands.push_back({-2, 0}); }, "band is (-2, 0)"},
        Fault{"sources_missing", [](Plan& p) { p.sources.clear(); }, "key sources"},
        Fault{"source_zero_changed", [](Plan& p) { p.sources[0].keys = 50; }, "source 0"},
        Fault{"source_keys", [](Plan& p) { p.sources[1].keys = -1; }, "'sampled' has -1 keys"},
        Fault{"query_order_blocks", [](Plan& p) { p.query_order = {{}, {}}; }, "query_order has 2"},
        Fault{"query_order_too_long", [](Plan& p) { p.query_order = {std::vector<std::int32_t>(21)}; }, "at most 20"},
        Fault{"query_order_twice", [](Plan& p) { p.query_order = {std::vector<std::int32_t>(20)}; }, "twice"},
        Fault{"query_order_range", [](Plan& p) { p.query_order = {{20}}; }, "holds 20"},
        Fault{"key_order_short", [](Plan& p) { p.key_order = {{0, 1}}; }, "expected 50"},
        Fault{"key_order_negative", [](Plan& p) { p.key_order = {std::vector<std::int32_t>(50, -1)}; }, "holds -1"}),
    [](const auto& fault) { return fault.param.what; });

TEST(Validate, AcceptsEntriesThatShareKeysButNoPair) {
  Problem problem = causal_problem();
  problem.causal = false;
  PlanBuilder builder(problem, 20, 16, 1, 1);
  std::vector<std::uint64_t> even(20, 0x5555);
  std::vector<std::uint64_t> odd(20, 0xAAAA);
  builder.run(0, 16, EntryMask::bitmask, builder.add_mask(even));
  builder.run(0, 16, EntryMask::bitmask, builder.add_mask(odd));
  builder.end_row();
  Plan plan = std::move(builder).finish();
  EXPECT_NO_THROW(validate(plan));
  plan.mask_words[3] |= 2;
  EXPECT_THROW(validate(plan), Error);
}

TEST(Validate, JudgesCausalityInOriginalPositions) {
  Problem problem = causal_problem();
  problem.q_heads = 1;
  PlanBuilder builder(problem, 20, 50, 1, 1);
  std::vector<std::int32_t> reversed(50);
  std::iota(reversed.rbegin(), reversed.rend(), 0);
  builder.set_key_order(0, reversed);
  builder.run(19, 31);  // original keys 30 to 0
  builder.end_row();
  Plan plan = std::move(builder).finish();
  EXPECT_NO_THROW(validate(plan));
  plan.entries[0].begin = 18;  // key 31 comes after query 30
  EXPECT_THROW(validate(plan), Error);
}

/// Any valid plan with one random field changed at random either stays valid or is refused; and what validate() accepts
/// holds no pair twice and none that the hard mask forbids.
TEST(Validate, NeverAcceptsAPairTwiceOrForbidden) {
  testing::Random random(21);
  int accepted = 0;
  for (int i = 0; i < 2000; ++i) {
    const Problem problem = testing::random_problem(random);
    Plan plan = testing::random_plan(random, problem, {0, i % 2 == 0, i % 3 == 0});
    if (plan.entries.empty()) continue;
    auto& entry = plan.entries[static_cast<std::size_t>(
        testing::uniform(random, 0, static_cast<std::int64_t>(plan.entries.size()) - 1))];
    switch (testing::uniform(random, 0, 4)) {
      case 0:
        entry.begin += testing::uniform(random, -3, 3);
        break;
      case 1:
        entry.count += static_cast<std::int32_t>(testing::uniform(random, -3, 3));
        break;
      case 2:
        entry.mask = static_cast<EntryMask>(testing::uniform(random, 0, 2));
        break;
      case 3:
        entry.kind = static_cast<EntryKind>(testing::uniform(random, 0, 2));
        break;
      default:
        entry.mask_index += testing::uniform(random, -2, 2);
        break;
    }
    SCOPED_TRACE(testing::describe(plan));
    try {
      validate(plan);
    } catch (const Error&) {
      continue;
    }
    ++accepted;
    const std::vector<std::uint8_t> mask = dense_mask(plan);
    const std::vector<std::uint8_t> allowed = testing::allowed_mask(problem);
    std::int64_t pairs = 0;
    for (std::size_t p = 0; p < mask.size(); ++p) {
      ASSERT_LE(mask[p], allowed[p]);
      pairs += mask[p];
    }
    // A pair covered twice would be counted twice.
    ASSERT_EQ(statistics(plan).planned_pairs, pairs);
  }
  EXPECT_GT(accepted, 100);
}

}  // namespace
}  // namespace tessera
