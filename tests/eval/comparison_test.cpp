// Comparison: what a measurement says, budgets at equal density, lists of SPECs, curves read at an error.
#include "eval/comparison.h"

#include <gtest/gtest.h>

#include <cmath>
#include <ctime>

#include "score/attention_case.h"

namespace tessera::eval {
namespace {

using test::AttentionCase;

ComparisonOptions quick() {
  ComparisonOptions options;
  options.repeats = 1;
  options.quality.query_blocks = 2;
  options.rates = {.gflops = 100, .gbps = 10};
  return options;
}

TEST(Comparison, MeasuresAMethodAgainstDense) {
  const AttentionCase input({.name = "chunk", .q_heads = 4, .kv_heads = 2, .q_len = 256, .kv_len = 512});
  ComparisonOptions options = quick();
  options.quality.query_blocks = 1000;  // all rows, as the error has them
  const Comparison comparison(input.problem, input.inputs, options);
  const MethodMeasurement dense = comparison.measure("dense");
  EXPECT_EQ(dense.density, 1);
  EXPECT_EQ(dense.error.rel_l2, 0);
  EXPECT_NEAR(dense.quality->mass, 1, 1e-5);
  const MethodMeasurement window = comparison.measure("window:left=63");
  EXPECT_EQ(window.method, "window");
  EXPECT_NEAR(window.density, 64.0 * 256 / (256.0 * 256 + 256.0 * 257 / 2), 1e-9);
  EXPECT_GT(window.error.rel_l2, 0.1);
  EXPECT_LT(window.quality->mass, 0.9);
  EXPECT_NEAR(window.error.softmax_mass, window.quality->mass, 1e-4);
  EXPECT_LT(window.flops, 0.7 * window.dense_flops);
  EXPECT_GT(window.speed_up(), 0);
  // 100 GFLOP/s bound it: bytes are few at 10 GB/s.
  EXPECT_NEAR(window.predicted_ms, window.flops / 100e6, 1e-9);
}

TEST(Comparison, TimesMayBeThoseOfTheProcessor) {
  const AttentionCase input({.name = "time", .q_heads = 2, .q_len = 512, .kv_len = 512});
  for (const int repeats : {1, 3}) {
    ComparisonOptions options = quick();
    options.repeats = repeats;
    options.cpu_time = true;
    options.run.threads = 1;
    const auto begin = std::clock();
    const MethodMeasurement m = Comparison(input.problem, input.inputs, options).measure("xattention");
    const double all_ms = 1e3 * static_cast<double>(std::clock() - begin) / static_cast<double>(CLOCKS_PER_SEC);
    EXPECT_GT(m.dense_ms, 0);
    EXPECT_GT(m.plan_ms, 0);
    EXPECT_LE(m.plan_ms + m.kernel_ms + m.dense_ms, all_ms) << "they are parts of what the process computed";
  }
}

TEST(Comparison, MethodsWithSideInputsAndBranchesRun) {
  const AttentionCase input({.name = "gated", .q_len = 256, .kv_len = 256});
  const Comparison comparison(input.problem, input.inputs, quick());
  EXPECT_FALSE(comparison.measure("nsa:top_k=4,window=64").quality) << "outputs of three branches are not a selection";
  EXPECT_GT(comparison.measure("gated").error.rel_l2, 0);
}

TEST(Comparison, WhatCannotBeComparedIsRefused) {
  const AttentionCase input({.name = "causal", .q_len = 128, .kv_len = 128});
  const Comparison comparison(input.problem, input.inputs, quick());
  EXPECT_THROW(comparison.measure("lightning2"), Error);
  EXPECT_THROW(comparison.measure("tidaldecode"), Error);
  EXPECT_THROW(comparison.measure("pisa"), Error) << "bidirectional only";
  EXPECT_THROW(comparison.measure("no-such-method"), Error);
  const AttentionCase ragged({.name = "ragged", .q_lens = {5, 6}, .kv_lens = {5, 6}});
  EXPECT_THROW(Comparison(ragged.problem, ragged.inputs, quick()), Error);
}

TEST(Comparison, FindsTheBudgetOfADensity) {
  const AttentionCase input({.name = "long", .q_heads = 2, .q_len = 2048, .kv_len = 2048});
  const Comparison comparison(input.problem, input.inputs, quick());
  for (const std::string spec : {"window", "oracle-topk:block_q=32,block_k=32,unit=token", "xattention:block=32"}) {
    for (const double target : {0.4, 0.2}) {
      const auto at = comparison.at_density(spec, target);
      ASSERT_TRUE(at) << spec << " at " << target;
      EXPECT_NEAR(comparison.measure(*at).executed_density, target, std::max(0.005, 0.1 * target)) << *at;
    }
  }
  EXPECT_FALSE(comparison.at_density("dense", 0.5)) << "has no budget";
  EXPECT_FALSE(comparison.at_density("window:left=100", 0.5)) << "sets it";
  EXPECT_FALSE(comparison.at_density("oracle-topk", 0.01)) << "a tile of 128 rows and keys is more";
}

TEST(Comparison, ListsOfSpecs) {
  using Specs = std::vector<std::string>;
  EXPECT_EQ(split_specs("dense"), (Specs{"dense"}));
  EXPECT_EQ(split_specs("dense,window:left=3,right=2,moba"), (Specs{"dense", "window:left=3,right=2", "moba"}));
  EXPECT_EQ(split_specs("a:x=1,b:y=2,z=3,c.json"), (Specs{"a:x=1", "b:y=2,z=3", "c.json"}));
  EXPECT_EQ(with_parameter("a", "x", "1"), "a:x=1");
  EXPECT_EQ(with_parameter("a:x=1", "y", "2"), "a:x=1,y=2");
}

MethodMeasurement point(double density, double error, double milliseconds) {
  MethodMeasurement measurement;
  measurement.executed_density = density;
  measurement.error.rel_l2 = error;
  measurement.kernel_ms = milliseconds;
  measurement.dense_ms = 100;
  return measurement;
}

TEST(Comparison, ReadsCurvesAtAnError) {
  const std::vector<MethodMeasurement> curve{point(0.4, 0.01, 50), point(0.1, 0.16, 12.5), point(0.02, 0.9, 5)};
  const auto middle = at_error(curve, 0.04);
  ASSERT_TRUE(middle);
  EXPECT_NEAR(middle->density, 0.2, 1e-9) << "half way between the logarithms";
  EXPECT_NEAR(middle->speed_up, 4, 1e-9);
  EXPECT_NEAR(at_error(curve, 0.16)->density, 0.1, 1e-9);
  EXPECT_FALSE(at_error(curve, 0.001));
  EXPECT_FALSE(at_error(curve, 2));
  EXPECT_FALSE(at_error({}, 0.1));
}

}  // namespace
}  // namespace tessera::eval
