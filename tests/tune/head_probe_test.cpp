// The probe for retrieval heads: against its definition, and on the model whose heads are known.
#include "tune/head_probe.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "eval/induction.h"

namespace tessera::tune {
namespace {

std::vector<float> normal_values(std::int64_t count, std::uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values;
  for (std::int64_t i = 0; i < count; ++i) values.push_back(normal(random));
  return values;
}

TEST(HeadProbe, EqualsItsDefinition) {
  struct Case {
    std::int64_t q_heads, kv_heads, first, period, repeats;
  };
  for (const Case& c : {Case{4, 2, 1, 37, 3}, Case{1, 1, 0, 2, 4}, Case{3, 1, 5, 130, 2}}) {
    constexpr std::int64_t dim = 16;
    const std::int64_t tokens = c.first + c.period * c.repeats;
    Problem problem;
    problem.q_heads = c.q_heads;
    problem.kv_heads = c.kv_heads;
    problem.q_len = problem.kv_len = tokens;
    problem.head_dim = problem.value_dim = dim;
    problem.causal = true;
    const auto q = normal_values(c.q_heads * tokens * dim, 1);
    const auto k = normal_values(c.kv_heads * tokens * dim, 2);
    AttentionInputs inputs;
    inputs.q = view_of(q.data(), DType::f32, {1, c.q_heads, tokens, dim});
    inputs.k = inputs.v = view_of(k.data(), DType::f32, {1, c.kv_heads, tokens, dim});
    const RepeatScores one = score_repeats(problem, inputs, c.first, c.period, c.repeats, 1);
    const RepeatScores two = score_repeats(problem, inputs, c.first, c.period, c.repeats, 2);
    EXPECT_EQ(one.echo, two.echo);
    EXPECT_EQ(one.induction, two.induction);
    for (std::int64_t head = 0; head < c.q_heads; ++head) {
      const std::int64_t kv = head / (c.q_heads / c.kv_heads);
      double echo = 0;
      double induction = 0;
      for (std::int64_t i = c.first + c.period; i < tokens; ++i) {
        std::vector<double> weights;
        double total = 0;
        for (std::int64_t j = 0; j <= i; ++j) {
          double score = 0;
          for (std::int64_t d = 0; d < dim; ++d) {
            score += static_cast<double>(q[(head * tokens + i) * dim + d]) * k[(kv * tokens + j) * dim + d];
          }
          weights.push_back(std::exp(score / 4));
          total += weights.back();
        }
        const std::int64_t place = (i - c.first) % c.period;
        const std::int64_t repeat = (i - c.first) / c.period;
        for (std::int64_t earlier = 0; earlier < repeat; ++earlier) {
          const std::int64_t key = c.first + earlier * c.period + place;
          echo += weights[static_cast<std::size_t>(key)] / total;
          induction += weights[static_cast<std::size_t>(key + 1)] / total;
        }
      }
      const auto queries = static_cast<double>(tokens - c.first - c.period);
      EXPECT_NEAR(one.echo[static_cast<std::size_t>(head)], echo / queries, 1e-5);
      EXPECT_NEAR(one.induction[static_cast<std::size_t>(head)], induction / queries, 1e-5);
    }
  }
}

TEST(HeadProbe, FindsTheInductionHeadOfTheConstructedModelAndNoOther) {
  const eval::InductionModel model;
  std::mt19937 random(3);
  constexpr std::int64_t period = 200;
  std::vector<std::int32_t> tokens;
  for (std::int64_t i = 0; i < period; ++i) tokens.push_back(static_cast<std::int32_t>(random() % 8192));
  for (std::int64_t i = 0; i < 3 * period; ++i) tokens.push_back(tokens[static_cast<std::size_t>(i)]);
  const eval::LayerTensors first = model.previous_token_layer(tokens);
  std::vector<float> previous(tokens.size() * 64);
  run(dense_plan(first.problem), first.inputs(),
      {mutable_view_of(previous.data(), DType::f32, {1, 1, std::ssize(tokens), 64}), {}});
  const eval::LayerTensors second = model.induction_layer(tokens, previous);
  const std::vector<RepeatScores> layers{score_repeats(first.problem, first.inputs(), 0, period, 4),
                                         score_repeats(second.problem, second.inputs(), 0, period, 4)};
  EXPECT_LT(layers[0].induction[0], 0.05);
  EXPECT_LT(layers[0].echo[0], 0.05);
  EXPECT_GT(layers[1].induction[0], 0.95);
  EXPECT_LT(layers[1].echo[0], 0.01);
  EXPECT_EQ(retrieval_heads(layers, 1, 0.14, 0.01), (std::vector<std::vector<bool>>{{false}, {true}}));
}

TEST(HeadProbe, PoolsTheLayersAndTakesAGroupForItsBestHead) {
  // Two layers of 4 query heads on 2 kv heads.
  const std::vector<RepeatScores> layers{{.echo = {0, 0.9, 0, 0}, .induction = {0.1, 0.1, 0.1, 0.1}},
                                         {.echo = {0, 0, 0, 0}, .induction = {0.1, 0.1, 0.1, 0.8}}};
  using Heads = std::vector<std::vector<bool>>;
  EXPECT_EQ(retrieval_heads(layers, 2, 0.14, 0.01), (Heads{{false, false}, {false, true}}));  // 1 and 0 of 8
  EXPECT_EQ(retrieval_heads(layers, 2, 0.14, 0.125), (Heads{{true, false}, {false, true}}));  // and 1 by echo
  EXPECT_EQ(retrieval_heads(layers, 2, 0.25, 0), (Heads{{true, false}, {false, true}}));      // ties: the earlier
  EXPECT_EQ(retrieval_heads(layers, 2, 1, 0), (Heads{{true, true}, {true, true}}));
  EXPECT_EQ(retrieval_heads(layers, 2, 0, 0), (Heads{{false, false}, {false, false}}));
}

TEST(HeadProbe, RefusesOtherProblems) {
  const std::vector<float> values(64 * 16);
  Problem problem;
  problem.q_len = problem.kv_len = 64;
  problem.head_dim = problem.value_dim = 16;
  problem.causal = true;
  AttentionInputs inputs;
  inputs.q = inputs.k = inputs.v = view_of(values.data(), DType::f32, {1, 1, 64, 16});
  EXPECT_NO_THROW(score_repeats(problem, inputs, 0, 32, 2));
  EXPECT_THROW(score_repeats(problem, inputs, 1, 32, 2), Error);
  EXPECT_THROW(score_repeats(problem, inputs, 0, 64, 1), Error);
  problem.causal = false;
  EXPECT_THROW(score_repeats(problem, inputs, 0, 32, 2), Error);
}

}  // namespace
}  // namespace tessera::tune
