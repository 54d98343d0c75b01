// The quality of selections against plain sums over dense probabilities.
#include "eval/selection_quality.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <numeric>

#include "methods/masks.h"

namespace tessera::eval {
namespace {

using test::AttentionCase;

const QualityOptions kAllBlocks{.tile = 16, .query_blocks = 1000};

SelectionQuality quality_of(const std::string& spec, const AttentionCase& input, const QualityOptions& options) {
  return judge_selection(make_method(spec)->plan(input.problem, input.inputs, {}), input.inputs, options);
}

TEST(SelectionQuality, DenseHasEverything) {
  const AttentionCase input({.name = "dense", .q_heads = 4, .kv_heads = 2, .q_len = 100, .kv_len = 180});
  const SelectionQuality quality = quality_of("dense", input, kAllBlocks);
  for (const double x : {quality.mass, quality.mass_p5, quality.sink_free_mass, quality.value_weighted_mass,
                         quality.tile_recall, quality.mass_efficiency, quality.oracle_tile_mass,
                         quality.oracle_token_mass, quality.random_mass, quality.chance_corrected()}) {
    EXPECT_NEAR(x, 1, 1e-5);
  }
  EXPECT_NEAR(quality.budget_loss(), 0, 1e-5);
}

TEST(SelectionQuality, FollowsPlainSums) {
  const AttentionCase input({.name = "window", .q_len = 96, .kv_len = 160});
  for (const std::string spec :
       {"window:left=20", "streaming:n_init=3,n_local=11", "pbs:block=16,segment=32,threshold=0.3"}) {
    const auto masks = test::masks_of(spec, input);
    double mass = 0;
    double sink_free = 0;
    double weighted = 0;
    double oracle_tokens = 0;
    double oracle_tiles = 0;
    double touched_mass = 0;
    double best_touched = 0;
    double recall = 0;
    for (std::int64_t h = 0; h < 2; ++h) {
      for (std::int64_t block = 0; block < 6; ++block) {
        std::vector<double> tiles(static_cast<std::size_t>(5 + block), 0.0);
        std::vector<bool> touched(tiles.size(), false);
        double pairs = 0;
        for (std::int64_t n = block * 16; n < block * 16 + 16; ++n) {
          auto p = input.probabilities(0, h, n);
          double kept = 0;
          double sinks = 0;
          double kept_sinks = 0;
          double kept_norms = 0;
          double norms = 0;
          std::int64_t count = 0;
          for (std::int64_t j = 0; j < 160; ++j) {
            double norm = 0;
            for (std::int64_t d = 0; d < 8; ++d) norm += std::pow(input.v(0, 0, j, d), 2);
            if (p[j] > 0) tiles[j / 16] += p[j];
            norms += p[j] * std::sqrt(norm);
            if (j < 4) sinks += p[j];
            if (!masks[h].at(n, j)) continue;
            touched[j / 16] = true;
            ++count;
            ++pairs;
            kept += p[j];
            kept_norms += p[j] * std::sqrt(norm);
            if (j < 4) kept_sinks += p[j];
          }
          mass += kept;
          sink_free += (kept - kept_sinks) / (1 - sinks);
          weighted += kept_norms / norms;
          std::sort(p.begin(), p.end(), std::greater<>());
          if (n % 8 == 0) oracle_tokens += std::accumulate(p.begin(), p.begin() + count, 0.0);
        }
        std::vector<std::size_t> order(tiles.size());
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return tiles[a] > tiles[b]; });
        const auto count = std::count(touched.begin(), touched.end(), true);
        double common = 0;
        for (std::ptrdiff_t i = 0; i < count; ++i) {
          best_touched += tiles[order[i]];
          common += touched[order[i]] ? 1 : 0;
        }
        for (std::size_t i = 0; static_cast<double>(i) < pairs / 256; ++i) oracle_tiles += tiles[order[i]];
        for (std::size_t t = 0; t < tiles.size(); ++t) touched_mass += touched[t] ? tiles[t] : 0;
        recall += common / static_cast<double>(count);
      }
    }
    const SelectionQuality quality = quality_of(spec, input, kAllBlocks);
    EXPECT_NEAR(quality.mass, mass / 192, 1e-5) << spec;
    EXPECT_NEAR(quality.sink_free_mass, sink_free / 192, 1e-5) << spec;
    EXPECT_NEAR(quality.value_weighted_mass, weighted / 192, 1e-5) << spec;
    EXPECT_NEAR(quality.oracle_token_mass, oracle_tokens / 24, 1e-5) << spec;
    EXPECT_NEAR(quality.oracle_tile_mass, oracle_tiles / 192, 1e-5) << spec;
    EXPECT_NEAR(quality.mass_efficiency, touched_mass / best_touched, 1e-5) << spec;
    EXPECT_NEAR(quality.tile_recall, recall / 12, 1e-9) << spec;
    EXPECT_NEAR(quality.budget_loss() + quality.granularity_loss() + quality.estimator_loss(), 1 - quality.mass, 1e-12);
    EXPECT_LT(quality.mass_p5, quality.mass);
  }
}

TEST(SelectionQuality, MassOfRandomTilesIsThatOfManyDraws) {
  // Uniform attention: k of n tiles hold k / n of the mass, whichever they are.
  AttentionCase input({.name = "uniform", .q_heads = 1, .q_len = 16, .kv_len = 320, .causal = false});
  for (std::int64_t j = 0; j < 320; ++j) {
    for (std::int64_t d = 0; d < 16; ++d) input.set_k(0, 0, j, d, 0);
  }
  const SelectionQuality quality =
      quality_of("oracle-topk:k=5,block_q=16,block_k=16,diagonal=false", input, kAllBlocks);
  EXPECT_NEAR(quality.random_mass, 5.0 / 20, 1e-5);
  EXPECT_NEAR(quality.mass, 5.0 / 20, 1e-5);
}

TEST(SelectionQuality, EveryShapeAndThreadCount) {
  for (const auto& shape : test::all_shapes()) {
    const AttentionCase input(shape);
    SCOPED_TRACE(shape.name);
    QualityOptions one{.tile = 32, .query_blocks = 3, .threads = 1};
    QualityOptions two = one;
    two.threads = 2;
    const SelectionQuality a = quality_of("streaming:n_init=4,n_local=20", input, one);
    const SelectionQuality b = quality_of("streaming:n_init=4,n_local=20", input, two);
    EXPECT_EQ(a.mass, b.mass);
    EXPECT_EQ(a.oracle_token_mass, b.oracle_token_mass);
    EXPECT_TRUE(a.mass >= 0 && a.mass <= a.oracle_token_mass + 1e-5) << a.mass << " " << a.oracle_token_mass;
  }
}

}  // namespace
}  // namespace tessera::eval
