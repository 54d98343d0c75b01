// Row maxima, tile maxima and the online skip of every instruction set against the float64 reference.
#include <gtest/gtest.h>

#include "kernels/kernel_case.h"

namespace tessera::testing {
namespace {

struct Maxima {
  KernelCase::Result result;
  std::vector<float> rows;
  std::vector<float> tiles;
  std::int64_t skipped = 0;
};

/// One run with both by-products; run_it(outputs) returns the skipped pairs.
template <class Run>
Maxima evaluate(const KernelCase& c, DType output, bool with_tiles, const Run& run_it) {
  const Plan& plan = c.plan;
  const Problem& p = plan.problem;
  const std::int64_t batch = p.variable_length() ? 1 : p.batch;
  const std::array<std::int64_t, 4> shape{p.batch, p.q_heads, (p.q_len + plan.tile_q - 1) / plan.tile_q,
                                          (p.kv_len + plan.tile_k - 1) / plan.tile_k};
  Maxima maxima;
  maxima.rows.assign(static_cast<std::size_t>(batch * p.q_heads * p.q_len), 777.0F);
  if (with_tiles) maxima.tiles.assign(static_cast<std::size_t>(shape[0] * shape[1] * shape[2] * shape[3]), 777.0F);
  maxima.result = c.evaluate(output, [&](AttentionOutputs outputs) {
    outputs.row_maximum = maxima.rows;
    if (with_tiles) outputs.tile_maximum = mutable_view_of(maxima.tiles.data(), DType::f32, shape);
    maxima.skipped = run_it(outputs);
  });
  return maxima;
}

Maxima by_reference(const KernelCase& c, bool with_tiles, OnlineSkip skip = {}) {
  return evaluate(c, DType::f32, with_tiles, [&](const AttentionOutputs& outputs) {
    RunOptions options;
    options.kernel = KernelKind::reference;
    options.online_skip = skip;
    return run(c.plan, c.inputs, outputs, options).skipped_pairs;
  });
}

Maxima by_kernel(const KernelCase& c, DType output, const TestedLevel& level, bool with_tiles, OnlineSkip skip = {},
                 int threads = 2, std::size_t workspace = std::size_t{48} << 20) {
  return evaluate(c, output, with_tiles, [&](const AttentionOutputs& outputs) {
    const kernels::Call call{c.plan, c.inputs, outputs, threads, workspace, nullptr, skip};
    kernels::clear_uncovered_rows(call);
    std::int64_t skipped = 0;
    kernels::run_query_major(call, *level.kernels, &skipped);
    return skipped;
  });
}

void expect_same(const std::vector<float>& expected, const std::vector<float>& actual, float tolerance) {
  ASSERT_EQ(expected.size(), actual.size());
  for (std::size_t i = 0; i < expected.size(); ++i) {
    if (std::isinf(expected[i])) {
      ASSERT_EQ(expected[i], actual[i]) << i;
    } else {
      ASSERT_NEAR(expected[i], actual[i], tolerance) << i;
    }
  }
}

TEST(Maxima, RowAndTileMaximaOfAnyPlan) {
  for (int seed = 0; seed < 16; ++seed) {
    Random random(static_cast<std::uint64_t>(seed));
    CaseOptions options = random_options(random);
    options.modifiers = seed % 3 == 0;
    options.sources = seed % 5 == 1;
    RandomPlanOptions plan_options;
    plan_options.derived_sources = options.sources;
    plan_options.key_orders = seed % 4 == 2;
    plan_options.query_orders = seed % 4 == 3;
    const KernelCase c(random, RandomPlan(random, random_problem(random), plan_options).make(), options);
    const bool with_tiles = !c.plan.problem.variable_length() && c.plan.query_order.empty();
    const Maxima expected = by_reference(c, with_tiles);
    for (const TestedLevel& level : tested_levels()) {
      SCOPED_TRACE(fmt::format("seed {}, {}", seed, level.name));
      const Maxima actual = by_kernel(c, options.output, level, with_tiles);
      expect_same(expected.rows, actual.rows, c.lse_tolerance());
      // exp turns the errors of score and log-sum-exp into a relative one; a rounded sum of probabilities adds its own.
      expect_same(expected.tiles, actual.tiles, 2 * c.lse_tolerance() + 1e-2F);
      if (HasFatalFailure()) return;
    }
  }
}

/// Key tiles of every query tile with probability `percent`, the causal edge under a mask.
Plan plan_of_tiles(Random& random, const Problem& problem, std::int64_t tile_q, std::int64_t tile_k, int percent,
                   std::int64_t plan_heads) {
  PlanBuilder builder(problem, tile_q, tile_k, plan_heads, problem.batch);
  for (std::int64_t block = 0; block < builder.blocks(); ++block) {
    for (std::int64_t tile = 0; tile < builder.query_tiles(block); ++tile) {
      const std::int64_t first = problem.q_offset_of(block / plan_heads) + tile * tile_q;
      const std::int64_t last = std::min(first + tile_q, problem.q_offset_of(block / plan_heads) + problem.q_len) - 1;
      for (std::int64_t j = 0; j * tile_k <= std::min(last, problem.kv_len - 1); ++j) {
        if (!chance(random, percent)) continue;
        builder.tiles(j, 1, (j + 1) * tile_k - 1 <= first ? EntryMask::none : EntryMask::band);
      }
      builder.end_row();
    }
  }
  return std::move(builder).finish();
}

TEST(OnlineSkip, FollowsTheReferenceTileByTile) {
  std::int64_t most_skipped = 0;
  const std::int64_t tiles_q[] = {16, 40, 64, 128, 160};
  const std::int64_t tiles_k[] = {16, 32, 64, 128};
  const std::int64_t groups[] = {1, 4, 16, 32, 128};
  for (int seed = 0; seed < 12; ++seed) {
    Random random(static_cast<std::uint64_t>(seed));
    Problem problem = random_problem(random);
    while (problem.variable_length()) problem = random_problem(random);
    problem.causal = true;
    problem.q_offset = {};
    problem.batch = 1 + seed % 2;
    problem.q_len = 150 + seed;
    problem.kv_len = 300 + 3 * seed;
    CaseOptions options = random_options(random);
    options.modifiers = seed % 4 == 0;
    const std::int64_t heads = seed % 3 == 0 ? problem.kv_heads : problem.q_heads;
    const std::int64_t tile_q = pick(random, tiles_q);
    const std::int64_t tile_k = pick(random, tiles_k);
    const OnlineSkip skip{2.5F, pick(random, groups)};
    const KernelCase c(random, plan_of_tiles(random, problem, tile_q, tile_k, 70, heads), options);
    const Maxima expected = by_reference(c, true, skip);
    most_skipped = std::max(most_skipped, expected.skipped);
    for (const TestedLevel& level : tested_levels()) {
      SCOPED_TRACE(
          fmt::format("seed {}, {}, tiles {} x {}, groups of {}", seed, level.name, tile_q, tile_k, skip.rows));
      const Maxima actual = by_kernel(c, options.output, level, true, skip);
      EXPECT_EQ(expected.skipped, actual.skipped);
      expect_same(expected.rows, actual.rows, c.lse_tolerance());
      expect_same(expected.result.lse, actual.result.lse, c.lse_tolerance());
      expect_same(expected.tiles, actual.tiles, 2 * c.lse_tolerance() + 1e-2F);
      const bool pairs = level.kernels->pairs_bf16 && options.dtype == DType::bf16;
      expect_same(expected.result.o, actual.result.o, c.tolerance(pairs));
      // Neither threads nor where keys are packed may matter.
      const Maxima small = by_kernel(c, options.output, level, true, skip, 1, 1);
      EXPECT_EQ(small.result.raw, actual.result.raw);
      EXPECT_EQ(small.skipped, actual.skipped);
      if (HasFailure()) return;
    }
  }
  EXPECT_GT(most_skipped, 1000);
}

/// By hand: rows of one direction, key tiles with one score each.
struct Levels {
  explicit Levels(std::vector<float> levels, bool causal = false) {
    Random random(1);
    Problem problem;
    problem.q_len = 32;
    problem.kv_len = static_cast<std::int64_t>(levels.size()) * 16;
    problem.causal = causal;
    problem.scale = 1;
    problem.head_dim = problem.value_dim = 16;
    CaseOptions options;
    options.head_dim = options.value_dim = 16;
    c = std::make_unique<KernelCase>(random, dense_plan_of_tiles(problem), options);
    for (std::int64_t n = 0; n < 32; ++n) {
      for (std::int64_t d = 0; d < 16; ++d) store_from_float(c->q.view.row(0, 0, n), DType::f32, d, d == 0 ? 1.0F : 0);
    }
    for (std::int64_t n = 0; n < problem.kv_len; ++n) {
      for (std::int64_t d = 0; d < 16; ++d) {
        store_from_float(c->k.view.row(0, 0, n), DType::f32, d, d == 0 ? levels[static_cast<std::size_t>(n / 16)] : 0);
      }
    }
  }
  static Plan dense_plan_of_tiles(const Problem& problem) {
    PlanBuilder builder(problem, 32, 16, 1, 1);
    builder.tiles(0, problem.kv_len / 16, problem.causal ? EntryMask::band : EntryMask::none);
    builder.end_row();
    return std::move(builder).finish();
  }
  std::int64_t skipped(float distance, std::int64_t rows = 32) const {
    const std::int64_t expected = by_reference(*c, false, {distance, rows}).skipped;
    for (const TestedLevel& level : tested_levels()) {
      EXPECT_EQ(by_kernel(*c, DType::f32, level, false, {distance, rows}).skipped, expected) << level.name;
    }
    return expected;
  }
  std::unique_ptr<KernelCase> c;
};

TEST(OnlineSkip, DistanceIsInPowersOfTwoBelowTheMaximumSoFar) {
  const float log2 = std::log(2.0F);
  // Tile 1 is 10 powers of 2 below tile 0, tile 2 above both, tile 3 is 10.5 below tile 2; the last one is exempt.
  const Levels levels({0, -10 * log2, 3 * log2, -7.5F * log2, -90});
  EXPECT_EQ(levels.skipped(9.9F), 2 * 16 * 32);
  EXPECT_EQ(levels.skipped(10.2F), 16 * 32);
  EXPECT_EQ(levels.skipped(10.6F), 0);
  EXPECT_EQ(levels.skipped(0), 0);
  // Order matters: nothing is below what comes later.
  EXPECT_EQ(Levels({-50, -20, 0, 0}).skipped(5), 0);
}

TEST(OnlineSkip, OneRowKeepsTheTileOfItsGroup) {
  Levels levels({0, -50, 0});
  for (std::int64_t j = 16; j < 32; ++j) store_from_float(levels.c->k.view.row(0, 0, j), DType::f32, 1, 1);
  store_from_float(levels.c->q.view.row(0, 0, 20), DType::f32, 1, 49.0F);  // row 20 likes tile 1
  EXPECT_EQ(levels.skipped(20, 32), 0);
  EXPECT_EQ(levels.skipped(20, 16), 16 * 16);
  EXPECT_EQ(levels.skipped(20, 1), 31 * 16);
}

TEST(OnlineSkip, MaskedTilesAndUndefinedScoresStay) {
  EXPECT_EQ(Levels({0, -50, -50, -50}, true).skipped(5), 0);
  Levels levels({0, -50, -50, 0});
  EXPECT_EQ(levels.skipped(5), 2 * 16 * 32);
  store_from_float(levels.c->k.view.row(0, 0, 20), DType::f32, 3, std::nanf(""));
  EXPECT_EQ(levels.skipped(5), 16 * 32);
}

TEST(Maxima, AreRefusedWhereNoKernelWritesThem) {
  Random random(3);
  Problem problem;
  problem.q_len = problem.kv_len = 40;
  problem.head_dim = problem.value_dim = 16;
  CaseOptions case_options;
  case_options.head_dim = case_options.value_dim = 16;
  const KernelCase c(random, dense_plan(problem, 16, 16), case_options);
  std::vector<float> rows(40);
  std::vector<float> tiles(9);
  c.evaluate(DType::f32, [&](AttentionOutputs outputs) {
    outputs.row_maximum = rows;
    EXPECT_EQ(run(c.plan, c.inputs, outputs).kernel, KernelKind::query_major);
    for (const KernelKind kind : {KernelKind::split_key, KernelKind::key_major}) {
      RunOptions options;
      options.kernel = kind;
      EXPECT_THROW(run(c.plan, c.inputs, outputs, options), Error);
    }
    outputs.row_maximum = std::span<float>(rows).first(39);
    EXPECT_THROW(run(c.plan, c.inputs, outputs), Error);
    outputs.row_maximum = {};
    outputs.tile_maximum = mutable_view_of(tiles.data(), DType::f32, {1, 1, 3, 3});
    EXPECT_NO_THROW(run(c.plan, c.inputs, outputs));
    outputs.tile_maximum = mutable_view_of(tiles.data(), DType::f32, {1, 1, 3, 2});
    EXPECT_THROW(run(c.plan, c.inputs, outputs), Error);
    AttentionInputs other = c.inputs;
    other.modifiers.weights = RowWeights::softplus;
    outputs.tile_maximum = mutable_view_of(tiles.data(), DType::f32, {1, 1, 3, 3});
    EXPECT_THROW(run(c.plan, other, outputs), Error);
    outputs.tile_maximum = {};
    for (const OnlineSkip skip : {OnlineSkip{-1, 32}, OnlineSkip{5, 0}, OnlineSkip{5, 48}, OnlineSkip{5, 32}}) {
      RunOptions options;
      options.online_skip = skip;  // the last one: the dense plan is made of runs
      EXPECT_THROW(run(c.plan, c.inputs, outputs, options), Error) << skip.distance << " " << skip.rows;
    }
  });
}

}  // namespace
}  // namespace tessera::testing
