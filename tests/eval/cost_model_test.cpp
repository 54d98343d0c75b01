#include "eval/cost_model.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "eval/model_evaluation.h"
#include "methods/neighborhood_parameters.h"
#include "tessera/method.h"

namespace tessera::eval {
namespace {

ModelConfig small_config() {
  ModelConfig config;
  config.layers = 3;
  config.q_heads = 4;
  config.kv_heads = 2;
  config.head_dim = 8;
  config.hidden_size = 32;
  config.intermediate_size = 48;
  config.vocab_size = 100;
  return config;
}

TEST(CostModel, WeightsAreThoseOfTheMatrices) {
  // q 32 x 32, k and v 32 x 16 each, o 32 x 32, gate, up and down 32 x 48 each.
  EXPECT_EQ(weights_per_token(small_config()), 3 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48));
  EXPECT_EQ(head_weights(small_config()), 3200);
}

TEST(CostModel, PrefillCountsEveryPair) {
  const ModelConfig config = small_config();
  double pairs = 0;
  for (int q = 0; q < 50; ++q) pairs += q + 1;
  const Cost dense = prefill_cost(config, 50, 1, 2);
  // A product of 8 and a sum of 8, in 4 heads of 3 layers.
  EXPECT_EQ(dense.flops, 2 * weights_per_token(config) * 50 + 2 * 3200 + pairs * 3 * 4 * (2 * 8 + 2 * 8));
  EXPECT_EQ(dense.bytes, 50 * 3 * 2 * (8 + 8) * 2);
  const Cost sparse = prefill_cost(config, 50, 0.25, 2);
  EXPECT_EQ(dense.flops - sparse.flops, 0.75 * pairs * 3 * 4 * 32);
}

/// The formulas are integrals over steps; this is the sum, in which step t reads min(budget, C + t) tokens.
Cost stepwise(const ModelConfig& config, int context, int generated, int trials, int budget, int block) {
  Cost cost;
  for (int trial = 0; trial < trials; ++trial) {
    for (int t = 0; t < generated; ++t) {
      const double read = std::min(budget, context + t);
      cost.flops += 2 * (weights_per_token(config) + head_weights(config)) + read * 3 * 4 * 32;
      cost.bytes += read * 3 * 2 * 16 * 2;
      if (block > 0) cost.flops += static_cast<double>(context + t) / block * 3 * 4 * 2 * 8;
      if (block > 0) cost.bytes += (trial == 0 ? context + t : t) / static_cast<double>(block) * 3 * 2 * 8 * 2;
    }
  }
  return cost;
}

TEST(CostModel, DecodingIsTheSumOverItsSteps) {
  const ModelConfig config = small_config();
  for (const int trials : {1, 3}) {
    const Decoding run{.context = 900, .generated = 400, .trials = static_cast<double>(trials)};
    for (const int budget : {200, 1000, 5000}) {
      SCOPED_TRACE(testing::Message() << trials << " trials, budget " << budget);
      const Cost expected = stepwise(config, 900, 400, trials, budget, 0);
      const Cost top_k = decode_cost_selected(config, run, top_k_tokens(run, budget));
      EXPECT_NEAR(top_k.flops / expected.flops, 1, 2e-3);
      EXPECT_NEAR(top_k.bytes / expected.bytes, 1, 2e-3);
      const Cost blocks = decode_cost_selected(config, run, top_k_tokens(run, budget), 16);
      const Cost searched = stepwise(config, 900, 400, trials, budget, 16);
      EXPECT_NEAR(blocks.flops / searched.flops, 1, 2e-3);
      EXPECT_NEAR(blocks.bytes / searched.bytes, 1, 2e-3);
    }
    // Dense trials share the prompt: one reading of it per step, whatever their number.
    const Cost dense = decode_cost(config, run);
    double bytes = 0;
    for (int t = 0; t < 400; ++t) bytes += (900 + trials * t) * 3 * 2 * 16 * 2;
    EXPECT_NEAR(dense.bytes / bytes, 1, 2e-3);
    EXPECT_NEAR(dense.flops / stepwise(config, 900, 400, trials, 1 << 20, 0).flops, 1, 2e-3);
  }
}

TEST(CostModel, WeightsAreReadOncePerStepForAllTrials) {
  const ModelConfig config = small_config();
  Decoding run{.context = 10, .generated = 5, .trials = 7};
  const double without = decode_cost(config, run).bytes;
  run.weight_bytes = 4000;
  EXPECT_EQ(decode_cost(config, run).bytes - without, 5 * 4000);
}

TEST(CostModel, TokensPassTheExpertsThatTheyChoose) {
  ModelConfig config = small_config();
  config.layer_kinds = {{}, {.experts = true}, {}};
  config.experts = {.count = 8, .chosen = 2, .intermediate_size = 20};
  const double plain = 32 * 32 + 2 * 32 * 16 + 32 * 32;
  EXPECT_EQ(weights_per_token(config), 3 * plain + 2 * (3 * 32 * 48) + 8 * 32 + 2 * (3 * 32 * 20));
}

TEST(CostModel, BytesHaveThePriceOfTheMachine) {
  const Cost cost{.flops = 3e9, .bytes = 2e8};
  const MachineRates rates{.gflops = 100, .gbps = 20};
  EXPECT_DOUBLE_EQ(cost.effective_flops(rates), 3e9 + 5 * 2e8);
  EXPECT_DOUBLE_EQ(cost.milliseconds(rates), 30 + 10);
  EXPECT_EQ(cost.milliseconds({}), 0);
}

TEST(CostModel, TimesOfASummaryFollowItsDensities) {
  const ModelConfig config = small_config();
  const MachineRates rates{.gflops = 100, .gbps = 20};
  const EvaluationCosts costs{.bytes_per_element = 4, .weight_bytes = 9000, .rates = rates};
  const auto decode = EvaluationPhase::decode;
  EvaluationSummary summary;
  summary.method = "dense";
  summary.density = 1;
  summary.prompt_tokens = 4000;
  summary.decode_tokens = 100;
  EXPECT_FALSE(predicted_times(summary, config, costs, decode).has_value()) << "a log without counts";
  summary.kept_tokens = 4100;
  const auto dense = predicted_times(summary, config, costs, decode);
  ASSERT_TRUE(dense.has_value());
  EXPECT_DOUBLE_EQ(dense->prefill_ms, prefill_cost(config, 4000, 1, 4).milliseconds(rates));
  EXPECT_DOUBLE_EQ(
      dense->decode_ms,
      decode_cost(config, {.context = 4000, .generated = 100, .bytes_per_element = 4, .weight_bytes = 9000})
          .milliseconds(rates));
  summary.density = 0.1;
  summary.kept_tokens = 500;
  const auto evicted = predicted_times(summary, config, costs, decode);
  EXPECT_LT(evicted->prefill_ms, dense->prefill_ms);
  EXPECT_LT(evicted->decode_ms, dense->decode_ms);
  // What was counted counts, whatever the cache holds.
  summary.kept_tokens = 4100;
  summary.decode_density = 500.0 / 4050;
  EXPECT_DOUBLE_EQ(predicted_times(summary, config, costs, decode)->decode_ms, evicted->decode_ms);
  summary.method = "quest:page=8";
  const double search = predicted_times(summary, config, costs, decode)->decode_ms - evicted->decode_ms;
  EXPECT_NEAR(search, (dense->decode_ms - Cost{2 * 3 * 100 * (5120 + 3200), 9000 * 100}.milliseconds(rates)) / 16, 1);
  EXPECT_DOUBLE_EQ(predicted_times(summary, config, costs, EvaluationPhase::prefill)->decode_ms, evicted->decode_ms);
}

TEST(CostModel, TheSimulatorPredictsWhatGnaPlans) {
  Problem problem;
  problem.q_len = problem.kv_len = 4 * 12 * 16;
  problem.head_dim = problem.value_dim = 16;
  problem.grid = TokenGrid{{4, 12, 16}, 0, 0};
  for (const char* spec :
       {"gna:window=3x5x8,stride=1", "gna:window=2x6x8,stride=2x6x8", "gna:window=4x5x7,stride=1x2x3",
        "gna:window=0x5x5,stride=1,dilation=1x2x2", "gna:window=3x4x4,stride=1,tile_q=2x4x4,tile_k=1x4x8"}) {
    SCOPED_TRACE(spec);
    const auto method = make_method(spec);
    const auto cost = simulate_call(problem, method->parameters());
    ASSERT_TRUE(cost.has_value());
    const PlanStatistics planned = statistics(method->plan(problem, {}, {}));
    EXPECT_EQ(cost->pairs, planned.planned_pairs);
    EXPECT_NEAR(static_cast<double>(cost->visited_pairs) / static_cast<double>(planned.executed_pairs), 1, 0.12);
  }
  const std::string parameters = make_method("gna")->parameters();
  problem.q_len = 5;
  EXPECT_FALSE(simulate_call(problem, parameters).has_value());
  problem.q_len = problem.kv_len;
  problem.causal = true;
  EXPECT_FALSE(simulate_call(problem, parameters).has_value()) << "raster order on top of the windows";
}

}  // namespace
}  // namespace tessera::eval
