// Input gradients of a decoder against finite differences, and its forward pass against that of sessions.
#include "model/differentiable.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "core/error.h"
#include "io/json.h"
#include "model/random_model.h"

namespace tessera::model {
namespace {

using tessera::testing::RandomModel;
using tessera::testing::RandomModelShape;
using tessera::testing::TemporaryFolder;

/// Dense attention; a fixed direction can be added to the output of one layer.
class DenseAttention final : public DifferentiableAttention {
 public:
  std::int64_t nudged = -1;
  float amount = 0;
  std::vector<float> direction;  ///< [rows][q_heads * head_dim]
  std::vector<std::vector<float>> d_outputs;

  void forward(std::int64_t layer, const Problem& problem, const AttentionInputs& inputs,
               const MutableTensorView& o) override {
    Saved& saved = saved_at(layer, problem);
    run(dense_plan(problem), inputs, {o, saved.lse});
    auto* values = static_cast<float*>(o.data);
    if (layer == nudged) {
      for (std::size_t i = 0; i < direction.size(); ++i) values[i] += amount * direction[i];
    }
    saved.o.assign(values, values + saved.o.size());
  }
  void backward(std::int64_t layer, const Problem& problem, const AttentionInputs& inputs, const TensorView& d_o,
                const Gradients& wanted) override {
    Saved& saved = saved_at(layer, problem);
    d_outputs.resize(std::max<std::size_t>(d_outputs.size(), static_cast<std::size_t>(layer) + 1));
    const auto* values = static_cast<const float*>(d_o.data);
    d_outputs[static_cast<std::size_t>(layer)].assign(values, values + saved.o.size());
    if (wanted.d_q.data == nullptr) return;
    // The output before the nudge is what the saved state describes.
    std::vector<float> o = saved.o;
    if (layer == nudged) {
      for (std::size_t i = 0; i < direction.size(); ++i) o[i] -= amount * direction[i];
    }
    run_backward(
        dense_plan(problem), inputs,
        {.o = view_of(o.data(), DType::f32, d_o.shape, Layout::bnhd), .lse = saved.lse, .d_o = d_o, .d_lse = {}},
        wanted);
  }

 private:
  struct Saved {
    std::vector<float> o, lse;
  };
  Saved& saved_at(std::int64_t layer, const Problem& problem) {
    saved_.resize(std::max<std::size_t>(saved_.size(), static_cast<std::size_t>(layer) + 1));
    Saved& saved = saved_[static_cast<std::size_t>(layer)];
    saved.o.resize(static_cast<std::size_t>(problem.q_heads * problem.q_len * problem.head_dim));
    saved.lse.resize(static_cast<std::size_t>(problem.q_heads * problem.q_len));
    return saved;
  }
  std::vector<Saved> saved_;
};

struct Loaded {
  explicit Loaded(const RandomModelShape& shape) : random(shape) {
    random.write(folder);
    model.emplace(Model::load(folder.path()));
  }
  RandomModel random;
  TemporaryFolder folder;
  std::optional<Model> model;
};

std::vector<float> normal_values(std::size_t count, std::uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values;
  for (std::size_t i = 0; i < count; ++i) values.push_back(normal(random));
  return values;
}

double dot(std::span<const float> a, std::span<const float> b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += static_cast<double>(a[i]) * b[i];
  return sum;
}

class Differentiable : public ::testing::TestWithParam<RandomModelShape> {};

TEST_P(Differentiable, GradientsEqualFiniteDifferences) {
  const Loaded loaded(GetParam());
  const RandomModelShape& shape = GetParam();
  const auto tokens = tessera::testing::random_tokens(37, shape.vocab, 3);
  for (const int threads : {1, 2}) {
    DifferentiableDecoder decoder(*loaded.model, threads);
    DenseAttention attention;
    const std::size_t size = decoder.forward(tokens, attention).size();
    const std::vector<float> weights = normal_values(size, 1);
    decoder.backward(weights, attention);
    const auto gradients = attention.d_outputs;
    ASSERT_EQ(std::ssize(gradients), shape.layers);
    for (std::int64_t layer = 0; layer < shape.layers; ++layer) {
      attention.nudged = layer;
      attention.direction = normal_values(tokens.size() * static_cast<std::size_t>(shape.q_heads * shape.head_dim),
                                          10 + static_cast<std::uint32_t>(layer));
      const double expected = dot(gradients[static_cast<std::size_t>(layer)], attention.direction);
      constexpr float step = 2e-3F;
      attention.amount = step;
      const double above = dot(decoder.forward(tokens, attention), weights);
      attention.amount = -step;
      const double below = dot(decoder.forward(tokens, attention), weights);
      EXPECT_NEAR((above - below) / (2 * step), expected, 2e-3 * std::abs(expected) + 5e-2) << "layer " << layer;
    }
  }
}

TEST_P(Differentiable, CrossEntropyAndItsGradient) {
  const Loaded loaded(GetParam());
  const RandomModelShape& shape = GetParam();
  const auto tokens = tessera::testing::random_tokens(90, shape.vocab, 4);
  DifferentiableDecoder decoder(*loaded.model);
  DenseAttention attention;
  const std::size_t size = decoder.forward(tokens, attention).size();
  const auto logits = loaded.random.forward(tokens);
  double expected = 0;
  for (std::size_t i = 5; i < 85; ++i) {
    double sum = 0;
    for (const double logit : logits[i - 1]) sum += std::exp(logit);
    expected -= (logits[i - 1][static_cast<std::size_t>(tokens[i])] - std::log(sum)) / 80;
  }
  std::vector<float> d_hidden(size);
  EXPECT_NEAR(decoder.cross_entropy(5, 85, d_hidden), expected, 1e-3);
  EXPECT_EQ(decoder.cross_entropy(5, 85, {}), decoder.cross_entropy(5, 85, d_hidden));
  std::fill(d_hidden.begin(), d_hidden.end(), 0.0F);
  decoder.cross_entropy(5, 85, d_hidden);
  decoder.backward(d_hidden, attention);
  attention.nudged = 0;
  attention.direction = normal_values(tokens.size() * static_cast<std::size_t>(shape.q_heads * shape.head_dim), 5);
  const double slope = dot(attention.d_outputs[0], attention.direction);
  constexpr float step = 5e-3F;
  attention.amount = step;
  decoder.forward(tokens, attention);
  const double above = decoder.cross_entropy(5, 85, {});
  attention.amount = -step;
  decoder.forward(tokens, attention);
  const double below = decoder.cross_entropy(5, 85, {});
  EXPECT_NEAR((above - below) / (2 * step), slope, 1e-2 * std::abs(slope) + 2e-3);
}

INSTANTIATE_TEST_SUITE_P(Shapes, Differentiable,
                         ::testing::Values(RandomModelShape{},
                                           RandomModelShape{
                                               .hidden = 33, .inner = 7, .layers = 3, .kv_heads = 4, .tied = true},
                                           RandomModelShape{.q_heads = 3, .kv_heads = 1, .head_dim = 10}));

TEST(DifferentiableDecoderErrors, SayWhatIsWrong) {
  const Loaded loaded({});
  DifferentiableDecoder decoder(*loaded.model);
  DenseAttention attention;
  EXPECT_THROW(decoder.forward({}, attention), Error);
  EXPECT_THROW(decoder.forward(std::vector<std::int32_t>{260}, attention), Error);
  EXPECT_THROW(decoder.backward({}, attention), Error);
  decoder.forward(std::vector<std::int32_t>{1, 2, 3}, attention);
  EXPECT_THROW(decoder.backward(std::vector<float>(5), attention), Error);
  EXPECT_THROW(decoder.cross_entropy(0, 3, {}), Error);
  EXPECT_THROW(decoder.cross_entropy(1, 4, {}), Error);
}

}  // namespace
}  // namespace tessera::model
