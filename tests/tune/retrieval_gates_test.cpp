// The search for retrieval heads by gradient: its gradient against finite differences, and the model whose heads are
// known.
#include "tune/retrieval_gates.h"

#include <gtest/gtest.h>

#include <cmath>
#include <optional>
#include <random>

#include "core/error.h"
#include "eval/induction.h"
#include "io/json.h"
#include "model/random_model.h"

namespace tessera::tune {
namespace {

TEST(GateObjective, GradientEqualsFiniteDifferences) {
  const testing::RandomModel random({.layers = 3});
  const testing::TemporaryFolder folder;
  random.write(folder);
  const Model model = Model::load(folder.path());
  const Prompt prompt{testing::random_tokens(61, 260, 3), {{30, 41}, {55, 61}}};
  for (const int threads : {1, 2}) {
    RunOptions run;
    run.threads = threads;
    model::DifferentiableDecoder decoder(model, threads);
    GateObjective objective(decoder, 2, 7, run);
    const Gates gates{{0.3, 0.8}, {0.5, 0.1}, {0.9, 0.6}};
    Gates gradient;
    EXPECT_GT(objective.evaluate(prompt, gates, &gradient), 1e-4);
    double largest = 0;
    for (const auto& layer : gradient) {
      for (const double slope : layer) largest = std::max(largest, std::abs(slope));
    }
    for (std::size_t layer = 0; layer < 3; ++layer) {
      for (std::size_t head = 0; head < 2; ++head) {
        constexpr double step = 0.02;
        Gates moved = gates;
        moved[layer][head] += step;
        const double above = objective.evaluate(prompt, moved, nullptr);
        moved[layer][head] -= 2 * step;
        const double below = objective.evaluate(prompt, moved, nullptr);
        EXPECT_NEAR((above - below) / (2 * step), gradient[layer][head], 0.02 * largest) << layer << " " << head;
      }
    }
    // Whole attention everywhere is the model itself; so is a window over everything.
    const Gates whole(3, std::vector<double>(2, 1.0));
    EXPECT_LT(objective.evaluate(prompt, whole, nullptr), 1e-10);
    GateObjective wide(decoder, 0, 61, run);
    EXPECT_LT(wide.evaluate(prompt, gates, nullptr), 1e-10);
  }
}

TEST(GateObjective, SaysWhatIsWrong) {
  const testing::RandomModel random({});
  const testing::TemporaryFolder folder;
  random.write(folder);
  const Model model = Model::load(folder.path());
  model::DifferentiableDecoder decoder(model);
  GateObjective objective(decoder, 2, 7);
  const Gates gates(2, std::vector<double>(2, 1.0));
  EXPECT_THROW(objective.evaluate({{1, 2, 3}, {}}, gates, nullptr), Error);
  EXPECT_THROW(objective.evaluate({{1, 2, 3}, {{2, 4}}}, gates, nullptr), Error);
  EXPECT_THROW(objective.evaluate({{1, 2, 3}, {{1, 3}}}, {{1, 1}}, nullptr), Error);
  EXPECT_THROW(objective.evaluate({{1, 2, 3}, {{1, 3}}}, {{1}, {1}}, nullptr), Error);
}

/// The constructed model of two layers with one head each; the second is the one that retrieves.
class DifferentiableInduction final : public model::DifferentiableModel {
 public:
  std::int64_t layers() const override { return 2; }
  std::int64_t kv_heads() const override { return 1; }
  std::span<const float> forward(std::span<const std::int32_t> tokens,
                                 model::DifferentiableAttention& attention) override {
    shape_ = {1, 1, std::ssize(tokens), 64};
    first_ = model_.previous_token_layer(tokens);
    previous_.resize(tokens.size() * 64);
    attention.forward(0, first_->problem, first_->inputs(), mutable_view_of(previous_.data(), DType::f32, shape_));
    second_ = model_.induction_layer(tokens, previous_);
    output_.resize(previous_.size());
    attention.forward(1, second_->problem, second_->inputs(), mutable_view_of(output_.data(), DType::f32, shape_));
    return output_;
  }
  void backward(std::span<const float> d_hidden, model::DifferentiableAttention& attention) override {
    std::vector<float> d_previous(previous_.size());
    Gradients wanted;
    wanted.d_k = mutable_view_of(d_previous.data(), DType::f32, shape_);  // the keys are the output of the first layer
    attention.backward(1, second_->problem, second_->inputs(), view_of(d_hidden.data(), DType::f32, shape_), wanted);
    attention.backward(0, first_->problem, first_->inputs(), view_of(d_previous.data(), DType::f32, shape_), {});
  }

 private:
  eval::InductionModel model_;
  std::array<std::int64_t, 4> shape_{};
  std::optional<eval::LayerTensors> first_, second_;
  std::vector<float> previous_, output_;
};

/// 84 random tokens, then 16 of them again: the answers.
Prompt repeated_prompt(std::int64_t step) {
  std::mt19937 random(static_cast<std::uint32_t>(step));
  Prompt prompt;
  for (int i = 0; i < 84; ++i) prompt.tokens.push_back(static_cast<std::int32_t>(random() % 8192));
  for (std::size_t i = 0; i < 16; ++i) prompt.tokens.push_back(prompt.tokens[20 + i]);
  prompt.answers.emplace_back(84, 100);
  return prompt;
}

TEST(LearnGates, FindsTheInductionHeadOfTheConstructedModelAndNoOther) {
  DifferentiableInduction model;
  RunOptions run;
  run.threads = 1;  // short rows
  const auto learn = [&](const GateSearch& search) {
    return learn_gates(
        model, search, repeated_prompt, [](std::int64_t) {}, run);
  };
  const LearnedGates learned = learn({.sink = 4, .recent = 16, .steps = 80, .penalty = 0.005});
  EXPECT_LT(learned.gates[0][0], 0.05);  // looks one token back: a window serves it
  EXPECT_GT(learned.gates[1][0], 0.8);
  EXPECT_EQ(learned.deviations.size(), 80U);
  // Without the penalty nothing moves: gates of 1 change nothing and have no gradient.
  const LearnedGates free = learn({.sink = 4, .recent = 16, .steps = 5, .penalty = 0});
  EXPECT_NEAR(free.gates[0][0], 1, 1e-3);
  EXPECT_NEAR(free.gates[1][0], 1, 1e-3);
  // A window that reaches the answers makes streaming heads of both.
  const LearnedGates wide = learn({.sink = 4, .recent = 100, .steps = 80, .penalty = 0.005});
  EXPECT_LT(wide.gates[1][0], 0.05);
}

TEST(LearnGates, FollowsTheSchedule) {
  const GateSearch search{.steps = 100};
  EXPECT_DOUBLE_EQ(learning_rate_share(search, 0), 0.1);  // 1 / 20, raised to the floor
  EXPECT_DOUBLE_EQ(learning_rate_share(search, 9), 0.5);
  EXPECT_DOUBLE_EQ(learning_rate_share(search, 19), 1);
  EXPECT_DOUBLE_EQ(learning_rate_share(search, 80), 1);
  EXPECT_DOUBLE_EQ(learning_rate_share(search, 90), 0.5);
  EXPECT_DOUBLE_EQ(learning_rate_share(search, 99), 0.1);
}

}  // namespace
}  // namespace tessera::tune
