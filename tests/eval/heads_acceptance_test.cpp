// The generator's acceptance: on each archetype the selectors that the literature says win do win, by 0.05 of mass.
#include <gtest/gtest.h>

#include <algorithm>
#include <string>

#include "eval/selectors.h"
#include "tessera/eval.h"

namespace tessera {
namespace {

constexpr double kMargin = 0.05;

eval::SelectorReport evaluate(const std::string& kind) {
  HeadOptions options;
  options.kind = kind;
  options.tokens = 8192;
  options.q_heads = options.kv_heads = 1;
  const HeadData data = make_heads(options);
  return eval::evaluate_selectors(data.problem, data.q(), data.k(), data.v(), 0);
}

double best_tile_selector(const eval::SelectorReport& r) {
  return std::max({r.window, r.vertical_slash, r.pooled, r.antidiagonal});
}

TEST(HeadsAcceptance, LinesAreWonByVerticalSlash) {
  for (const char* kind : {"vertical", "slash", "vertical-slash"}) {
    const eval::SelectorReport r = evaluate(kind);
    EXPECT_GT(r.vertical_slash, std::max({r.window, r.pooled, r.antidiagonal}) + kMargin) << kind;
  }
}

TEST(HeadsAcceptance, BlocksAreWonByAntidiagonalSums) {
  const eval::SelectorReport r = evaluate("blocks");
  EXPECT_GT(r.antidiagonal, std::max(r.window, r.vertical_slash) + kMargin);
}

TEST(HeadsAcceptance, RetrievalIsWonByPages) {
  const eval::SelectorReport r = evaluate("retrieval");
  EXPECT_GT(r.page_bound, std::max(best_tile_selector(r), r.oracle_tiles) + kMargin);
}

TEST(HeadsAcceptance, CoherentRetrievalIsWithinReachOfTiles) {
  const eval::SelectorReport r = evaluate("retrieval-coherent");
  EXPECT_GT(r.antidiagonal, std::max(r.window, r.vertical_slash) + kMargin);
}

TEST(HeadsAcceptance, ScatteredClustersAndNoiseAreLostOnTiles) {
  for (const char* kind : {"blocks-scattered", "diffuse"}) {
    const eval::SelectorReport r = evaluate(kind);
    EXPECT_LT(best_tile_selector(r), r.random_tiles + 0.1) << kind;
  }
}

TEST(HeadsAcceptance, LocalHeadsAreWonByAnything) {
  const eval::SelectorReport r = evaluate("sink-band");
  EXPECT_GT(std::min({r.window, r.vertical_slash, r.pooled, r.antidiagonal}), 0.9);
  EXPECT_LT(r.tokens_for_95, 0.05);
}

TEST(Selectors, BudgetOfAllTilesRecoversAll) {
  HeadOptions options;
  options.kind = "mixed";
  options.tokens = 1024;
  options.q_heads = options.kv_heads = 1;
  const HeadData data = make_heads(options);
  const eval::SelectorReport r =
      eval::evaluate_selectors(data.problem, data.q(), data.k(), data.v(), 0, {.budget = 1, .query_tiles = 4});
  for (const double mass :
       {r.oracle_tokens, r.oracle_tiles, r.window, r.pooled, r.antidiagonal, r.random_tiles, r.page_bound}) {
    EXPECT_NEAR(mass, 1, 1e-4);
  }
  EXPECT_NEAR(r.antidiagonal_rel_l1, 0, 1e-4);
}

TEST(Selectors, OracleIsNeverBeaten) {
  for (const char* kind : {"mixed", "slash", "spatial"}) {
    HeadOptions options;
    options.kind = kind;
    options.tokens = 4096;
    options.q_heads = options.kv_heads = 1;
    const HeadData data = make_heads(options);
    const eval::SelectorReport r =
        eval::evaluate_selectors(data.problem, data.q(), data.k(), data.v(), 0, {.query_tiles = 4});
    EXPECT_GE(r.oracle_tiles + 1e-6, std::max({r.window, r.pooled, r.antidiagonal, r.random_tiles})) << kind;
    EXPECT_GE(r.oracle_tokens + 1e-3, r.oracle_tiles) << kind;
  }
}

TEST(Selectors, BadInputIsNamed) {
  HeadOptions options;
  options.kind = "randn";
  options.tokens = 128;
  options.q_heads = options.kv_heads = 1;
  const HeadData data = make_heads(options);
  EXPECT_THROW(eval::evaluate_selectors(data.problem, data.q(), data.k(), data.v(), 0), Error);
  EXPECT_THROW(eval::evaluate_selectors(data.problem, data.q(), data.k(), data.v(), 1, {.tile = 16}), Error);
  EXPECT_THROW(eval::evaluate_selectors(data.problem, data.q(), data.k(), data.v(), 0, {.tile = 24}), Error);
}

}  // namespace
}  // namespace tessera
