#include "eval/induction.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <numeric>
#include <utility>

#include "core/error.h"
#include "eval/random.h"

namespace tessera::eval {
namespace {

Problem layer_problem(std::int64_t tokens, std::int64_t dim, double inverse_temperature) {
  Problem problem;
  problem.q_len = problem.kv_len = tokens;
  problem.head_dim = problem.value_dim = dim;
  problem.scale = static_cast<float>(inverse_temperature);
  problem.causal = true;
  return problem;
}

std::vector<float> run_layer(const LayerTensors& layer, const Attend& attend) {
  const Problem& problem = layer.problem;
  std::vector<float> o(problem.q_len * problem.value_dim);
  std::vector<float> lse(problem.q_len);
  attend(problem, layer.inputs(),
         {mutable_view_of(o.data(), DType::f32, {1, 1, problem.q_len, problem.value_dim}), std::span<float>(lse)});
  return o;
}

}  // namespace

Attend attend_by_plan(std::function<Plan(const Problem&, const AttentionInputs&)> make_plan, RunOptions options) {
  return [make_plan = std::move(make_plan), options](const Problem& problem, const AttentionInputs& inputs,
                                                     const AttentionOutputs& outputs) {
    run(make_plan(problem, inputs), inputs, outputs, options);
  };
}

Attend attend_by_method(const Method& method, std::int64_t layer, RunOptions options) {
  return [&method, layer, options](const Problem& problem, const AttentionInputs& inputs,
                                   const AttentionOutputs& outputs) {
    method.attend(problem, inputs, outputs, {.layer = layer, .layers = 2, .state = nullptr, .run = options});
  };
}

AttentionInputs LayerTensors::inputs() const {
  const std::array<std::int64_t, 4> shape = {1, 1, problem.q_len, problem.head_dim};
  AttentionInputs views;
  views.q = view_of(q.data(), DType::f32, shape);
  views.k = view_of(k.data(), DType::f32, shape);
  views.v = view_of(v.data(), DType::f32, shape);
  views.modifiers.sink_logits = sink_logits;
  return views;
}

InductionModel::InductionModel(const InductionOptions& options) : options_(options) {
  require(options.vocabulary > 0 && options.vocabulary <= (std::int64_t{1} << 24),
          "vocabulary is {}; expected 1 to 2^24", options.vocabulary);
  require(options.dim >= 2 && options.dim % 2 == 0 && options.dim <= 1024,
          "dim is {}; expected an even number, 2 to 1024", options.dim);
  embeddings_.assign(options.vocabulary * options.dim, 0.0F);
  for (std::int64_t token = 0; token < options.vocabulary; ++token) {
    const std::span<float> row(embeddings_.data() + token * options.dim, options.dim);
    Random(options.seed, {0, token}).add_normal(row, 1);
    const float norm = std::sqrt(std::inner_product(row.begin(), row.end(), row.begin(), 0.0F));
    for (float& value : row) value /= norm;
  }
  Random random(options.seed, {1});
  for (std::int64_t f = 0; f < options.dim / 2; ++f) frequencies_.push_back(random.uniform(0, std::numbers::pi));
}

std::vector<float> InductionModel::embed(std::span<const std::int32_t> tokens) const {
  std::vector<float> rows(tokens.size() * options_.dim);
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    require(tokens[i] >= 0 && tokens[i] < options_.vocabulary, "token {} is {}; expected 0 to {}", i, tokens[i],
            options_.vocabulary - 1);
    std::copy_n(embeddings_.data() + tokens[i] * options_.dim, options_.dim, rows.data() + i * options_.dim);
  }
  return rows;
}

/// Unit vectors of positions shift, shift + 1, ...
std::vector<float> InductionModel::positions(std::int64_t count, std::int64_t shift) const {
  std::vector<float> rows(count * options_.dim);
  const double weight = 1 / std::sqrt(static_cast<double>(frequencies_.size()));
  for (std::int64_t i = 0; i < count; ++i) {
    for (std::size_t f = 0; f < frequencies_.size(); ++f) {
      const double angle = frequencies_[f] * static_cast<double>(i + shift);
      rows[i * options_.dim + 2 * f] = static_cast<float>(weight * std::cos(angle));
      rows[i * options_.dim + 2 * f + 1] = static_cast<float>(weight * std::sin(angle));
    }
  }
  return rows;
}

LayerTensors InductionModel::previous_token_layer(std::span<const std::int32_t> tokens) const {
  const std::int64_t count = std::ssize(tokens);
  return {.problem = layer_problem(count, options_.dim, options_.previous_inverse_temperature),
          .q = positions(count, -1),
          .k = positions(count, 0),
          .v = embed(tokens),
          // Half way between the score of the wanted key and that of the others.
          .sink_logits = {static_cast<float>(options_.previous_inverse_temperature / 2)}};
}

LayerTensors InductionModel::induction_layer(std::span<const std::int32_t> tokens,
                                             std::span<const float> previous) const {
  const std::int64_t count = std::ssize(tokens);
  require(std::ssize(previous) == count * options_.dim, "previous has {} values; expected {} x {}", previous.size(),
          count, options_.dim);
  return {.problem = layer_problem(count, options_.dim, options_.induction_inverse_temperature),
          .q = embed(tokens),
          .k = {previous.begin(), previous.end()},
          .v = embed(tokens),
          .sink_logits = {}};
}

std::int32_t InductionModel::most_likely(std::span<const float> output) const {
  std::int32_t best = 0;
  float best_logit = -std::numeric_limits<float>::infinity();
  for (std::int64_t token = 0; token < options_.vocabulary; ++token) {
    const float* row = embeddings_.data() + token * options_.dim;
    const float logit = std::inner_product(output.begin(), output.end(), row, 0.0F);
    if (logit > best_logit) {
      best_logit = logit;
      best = static_cast<std::int32_t>(token);
    }
  }
  return best;
}

std::vector<std::int32_t> InductionModel::predict(std::span<const std::int32_t> tokens,
                                                  std::span<const std::int64_t> positions, const Attend& layer1,
                                                  const Attend& layer2) const {
  require(!tokens.empty(), "tokens is empty; expected at least one");
  const std::vector<float> previous = run_layer(previous_token_layer(tokens), layer1);
  const std::vector<float> output = run_layer(induction_layer(tokens, previous), layer2);
  std::vector<std::int32_t> predictions;
  for (const std::int64_t position : positions) {
    require(position >= 0 && position < std::ssize(tokens), "position is {}; expected 0 to {}", position,
            tokens.size() - 1);
    predictions.push_back(
        most_likely({output.data() + position * options_.dim, static_cast<std::size_t>(options_.dim)}));
  }
  return predictions;
}

}  // namespace tessera::eval
