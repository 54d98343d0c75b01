// The shared budgets on lists small enough to check by hand.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>

#include "score/always_keep.h"
#include "score/cumulative_mass.h"
#include "score/threshold.h"
#include "score/top_k.h"

namespace tessera::score {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

TEST(TopK, TiesGoToTheSmallerIndex) {
  const std::vector<float> scores{1, 3, 3, 2, 3};
  EXPECT_THAT(top_k(scores, 2), ElementsAre(1, 2));
  EXPECT_THAT(top_k(scores, 4), ElementsAre(1, 2, 3, 4));
  EXPECT_THAT(top_k(scores, 0), IsEmpty());
  EXPECT_THAT(top_k(scores, 99), ElementsAre(0, 1, 2, 3, 4));
  EXPECT_THAT(top_k({}, 3), IsEmpty());
}

TEST(TopK, ForcedEntriesCountInsideOrOutside) {
  const std::vector<float> scores{5, 4, 3, 2, 1};
  const std::vector<std::uint8_t> forced{0, 0, 0, 0, 1};
  EXPECT_THAT(top_k(scores, 2, forced, ForcedCount::inside), ElementsAre(0, 4));
  EXPECT_THAT(top_k(scores, 2, forced, ForcedCount::outside), ElementsAre(0, 1, 4));
  EXPECT_THAT(top_k(scores, 0, forced, ForcedCount::inside), ElementsAre(4));
}

TEST(TopK, UndefinedScoresAreKept) {
  const std::vector<float> scores{1, kNan, 3, kNan};
  EXPECT_THAT(top_k(scores, 1), ElementsAre(1, 3));
  EXPECT_THAT(top_k(scores, 3), ElementsAre(1, 2, 3));
}

TEST(CumulativeMass, RulesDifferByTheCrossingEntry) {
  const std::vector<float> weights{0.5F, 0.25F, 0.125F, 0.125F};
  EXPECT_EQ(count_by_mass(weights, 0.6, MassRule::topp_incl), 2);
  EXPECT_EQ(count_by_mass(weights, 0.6, MassRule::topp_excl), 1);
  EXPECT_EQ(count_by_mass(weights, 0.6, MassRule::topp_count), 2);
  // An exact tie.
  EXPECT_EQ(count_by_mass(weights, 0.75, MassRule::topp_incl), 2);
  EXPECT_EQ(count_by_mass(weights, 0.75, MassRule::topp_excl), 2);
  EXPECT_EQ(count_by_mass(weights, 0.75, MassRule::topp_count), 3);
  // Never none, never more than all.
  EXPECT_EQ(count_by_mass(weights, 0.1, MassRule::topp_excl), 1);
  EXPECT_EQ(count_by_mass(weights, 0.0, MassRule::topp_incl), 1);
  EXPECT_EQ(count_by_mass(weights, 2.0, MassRule::topp_count), 4);
  EXPECT_EQ(count_by_mass(weights, 2.0, MassRule::topp_incl), 4);
  EXPECT_EQ(count_by_mass({}, 0.5, MassRule::topp_incl), 0);
}

TEST(CumulativeMass, ForcedMassCountsFirst) {
  const std::vector<float> scores{4, 1, 3, 2};  // total 10
  const std::vector<std::uint8_t> forced{0, 0, 0, 1};
  EXPECT_THAT(select_mass(scores, 0.5, MassRule::topp_incl), ElementsAre(0, 2));
  EXPECT_THAT(select_mass(scores, 0.5, MassRule::topp_incl, forced), ElementsAre(0, 3));
  EXPECT_THAT(select_mass(scores, 0.2, MassRule::topp_incl, forced), ElementsAre(3));
  EXPECT_THAT(select_mass(scores, 0.0, MassRule::topp_incl), ElementsAre(0));
}

TEST(CumulativeMass, WholeShareAndUndefinedTotalsKeepEverything) {
  const std::vector<float> scores{1, 0, 0};  // the zeros add nothing to the sum
  EXPECT_THAT(select_mass(scores, 1.0, MassRule::topp_incl), ElementsAre(0, 1, 2));
  const std::vector<float> undefined{1, kNan, 2};
  EXPECT_THAT(select_mass(undefined, 0.1, MassRule::topp_incl), ElementsAre(0, 1, 2));
  EXPECT_THAT(select_mass({}, 0.5, MassRule::topp_incl), IsEmpty());
}

TEST(Threshold, KeepsAboveForcedAndUndefined) {
  const std::vector<float> scores{0.1F, 0.5F, kNan, 0.2F, 0.6F};
  const std::vector<std::uint8_t> forced{1, 0, 0, 0, 0};
  EXPECT_THAT(above_threshold(scores, 0.5F, forced), ElementsAre(0, 2, 4));
  EXPECT_THAT(above_threshold(scores, 1.0F), ElementsAre(2));
}

Problem causal_problem(std::int64_t queries, std::int64_t keys) {
  Problem problem;
  problem.q_len = queries;
  problem.kv_len = keys;
  problem.head_dim = problem.value_dim = 8;
  problem.causal = true;
  return problem;
}

TEST(AlwaysKeep, ForcesSinksWindowAndDiagonal) {
  // 100 queries at positions 300..399, tiles of 32: tile 1 holds positions 332..363.
  const QueryTiles tiles(causal_problem(100, 400), 0, 32, 32);
  std::vector<std::uint8_t> forced;
  AlwaysKeep{.sinks = 33, .diagonal = true}.force_tiles(tiles, 1, forced);
  EXPECT_THAT(forced, ElementsAre(1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1));
  AlwaysKeep{.local = 46, .diagonal = false}.force_tiles(tiles, 1, forced);  // from key 287
  EXPECT_THAT(forced, ElementsAre(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1));
  AlwaysKeep{.sinks = 2, .local = 3, .diagonal = false}.force_keys(tiles, 1, forced);
  std::vector<int> kept;
  for (std::size_t j = 0; j < forced.size(); ++j) {
    if (forced[j] != 0) kept.push_back(static_cast<int>(j));
  }
  EXPECT_EQ(forced.size(), 364U);
  EXPECT_EQ(kept.size(), 2U + 34U);
  EXPECT_EQ(kept[2], 330);
}

TEST(AlwaysKeep, DenseTilesAreTheLastOnesOrAllOfAShortSequence) {
  const QueryTiles tiles(causal_problem(100, 400), 0, 32, 32);
  const AlwaysKeep last{.last_rows = 5};
  EXPECT_FALSE(last.dense(tiles, 1));
  EXPECT_TRUE(last.dense(tiles, 2));  // rows 64..95: row 95 is one of the last 5
  EXPECT_TRUE(last.dense(tiles, 3));
  EXPECT_TRUE((AlwaysKeep{.dense_below = 401}).dense(tiles, 0));
  EXPECT_FALSE((AlwaysKeep{.dense_below = 400}).dense(tiles, 0));
}

}  // namespace
}  // namespace tessera::score
