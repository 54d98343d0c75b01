// The profile of spans: first-order influence against the loss when a block is masked, and the head that is known to
// look far back; the search as a whole.
#include "tune/span_profile.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "core/error.h"
#include "io/json.h"
#include "methods/elastic_spans.h"
#include "methods/head_table.h"
#include "model/random_model.h"
#include "tune/tuner.h"

namespace tessera::tune {
namespace {

/// Dense attention without one block of keys in one head of one layer; forward only.
class MaskedAttention final : public model::DifferentiableAttention {
 public:
  std::int64_t layer = -1, head = 0, query_block = 0, key_block = 0;  // layer -1: none is masked

  void forward(std::int64_t of_layer, const Problem& problem, const AttentionInputs& inputs,
               const MutableTensorView& o) override {
    run(dense_plan(problem), inputs, {o, {}});
    if (of_layer != layer) return;
    const std::int64_t kv = head / problem.group();
    for (std::int64_t i = query_block * 64; i < std::min((query_block + 1) * 64, problem.q_len); ++i) {
      double total = 0;
      std::vector<double> sums(static_cast<std::size_t>(problem.value_dim));
      for (std::int64_t j = 0; j <= i; ++j) {
        if (j / 64 == key_block) continue;
        double score = 0;
        for (std::int64_t d = 0; d < problem.head_dim; ++d) {
          score += static_cast<double>(load_as_float(inputs.q.row(0, head, i), DType::f32, d)) *
                   load_as_float(inputs.k.row(0, kv, j), DType::f32, d);
        }
        const double weight = std::exp(score * problem.softmax_scale());
        total += weight;
        for (std::int64_t d = 0; d < problem.value_dim; ++d) {
          sums[static_cast<std::size_t>(d)] += weight * load_as_float(inputs.v.row(0, kv, j), DType::f32, d);
        }
      }
      for (std::int64_t d = 0; d < problem.value_dim; ++d) {
        store_from_float(o.row(0, head, i), DType::f32, d,
                         static_cast<float>(sums[static_cast<std::size_t>(d)] / total));
      }
    }
  }
  void backward(std::int64_t, const Problem&, const AttentionInputs&, const TensorView&, const Gradients&) override {}
};

TEST(SpanProfile, IsTheFirstOrderChangeOfTheLoss) {
  const testing::RandomModel random({});
  const testing::TemporaryFolder folder;
  random.write(folder);
  const Model model = Model::load(folder.path());
  const Prompt prompt{testing::random_tokens(300, 260, 3), {{130, 300}}};
  model::DifferentiableDecoder decoder(model, 1);
  RunOptions run;
  run.threads = 1;
  const auto influence = profile_influence(decoder, 4, prompt, run);
  ASSERT_EQ(influence.size(), 8U);
  MaskedAttention attention;
  decoder.forward(prompt.tokens, attention);
  const double before = decoder.cross_entropy(130, 300, {});
  EXPECT_NEAR(answer_loss(decoder, prompt, *make_method("dense"), run), before, 1e-5);
  // Over many blocks: one first-order number may be off, their agreement may not.
  double product = 0, predicted_square = 0, square = 0;
  for (attention.layer = 0; attention.layer < 2; ++attention.layer) {
    for (attention.head = 0; attention.head < 4; ++attention.head) {
      for (const auto& [row, column] : {std::pair{4, 1}, std::pair{3, 0}, std::pair{3, 2}}) {
        attention.query_block = row;
        attention.key_block = column;
        decoder.forward(prompt.tokens, attention);
        const double change = decoder.cross_entropy(130, 300, {}) - before;
        const auto place = static_cast<std::size_t>(row) * 5 + static_cast<std::size_t>(column);
        const double predicted = influence[static_cast<std::size_t>(attention.layer * 4 + attention.head)][place];
        product += change * predicted;
        predicted_square += predicted * predicted;
        square += change * change;
      }
    }
  }
  EXPECT_GT(square, 1e-10);
  EXPECT_GT(product / std::sqrt(predicted_square * square), 0.9);
  // The entries of a block are masked together, their influence is counted one by one: the row is renormalised by
  // 1 / (1 - mass of the block) instead of 1 / (1 - one entry), and a block here holds up to a third of its rows.
  EXPECT_GT(product / predicted_square, 1);
  EXPECT_LT(product / predicted_square, 1.7);
  EXPECT_THROW(profile_influence(decoder, 4, {prompt.tokens, {}}, run), Error);
}

TEST(SpanProfile, FindsTheHeadThatLooksFarBack) {
  const Model model = Model::load(TESSERA_SOURCE_DIR "/models/tessera-bytes");
  Prompt prompt{repeated_tokens(model, 256, 2, 1), {{300, 512}}};
  model::DifferentiableDecoder decoder(model, 1);
  RunOptions run;
  run.threads = 1;
  const auto influence = profile_influence(decoder, 4, prompt, run);
  std::vector<double> far(16);
  for (std::size_t head = 0; head < 16; ++head) {
    for (std::size_t i = 4; i < 8; ++i) {
      for (std::size_t j = 1; j + 2 < i; ++j) far[head] += std::abs(influence[head][i * 8 + j]);
    }
  }
  EXPECT_EQ(std::max_element(far.begin(), far.end()) - far.begin(), 4);  // head 0 of layer 1: its induction head
}

TEST(MoaTuner, ChoosesSpansWithinTheDensity) {
  const testing::RandomModel random({.layers = 3, .max_positions = 4096});
  const testing::TemporaryFolder folder;
  random.write(folder);
  const Model model = Model::load(folder.path());
  TuningTask task;
  task.model = &model;
  task.length = 1024;
  task.run.threads = 1;
  const std::string parameters =
      R"({"samples": 1, "response": 8, "passkeys": 1, "words": 2, "alpha_step": 64, "intervals": 2})";
  const Json document = tune("moa", task, parameters);
  const Json& report = document["tuned"];
  EXPECT_EQ(report["lengths"], (Json{256, 512, 1024}));
  EXPECT_EQ(report["validated_length"], 1536);
  for (const double density : report["density"]) {
    EXPECT_LE(density, 0.5 + 1e-9);
    EXPECT_GE(density, 0.45 - 1e-9);
  }
  double least = 1e9;
  for (const double loss : report["validation_losses"]) least = std::min(least, loss);
  EXPECT_EQ(report["validation_loss"].get<double>(), least);
  EXPECT_EQ(report["choices"].get<std::size_t>(), report["validation_losses"].size());
  const HeadTable table = head_table_of(document["parameters"]["config"], "test");
  ASSERT_EQ(table.size(), 3U);
  for (const auto& layer : table) {
    ASSERT_EQ(layer.size(), 2U);
    std::set<std::pair<double, double>> rules;
    for (const HeadEntry& entry : layer) rules.emplace(entry.alpha, entry.beta);
    EXPECT_LE(rules.size(), 2U);
  }
  const std::shared_ptr<const Method> method = make_method(folder.file("moa.json", document.dump()).string());
  Session session(model, {.prefill = method});
  session.prefill(testing::random_tokens(768, 260, 1));
  EXPECT_LT(session.statistics().density(), 0.9);
  task.length = 300;
  EXPECT_THROW(tune("moa", task, parameters), Error);
}

}  // namespace
}  // namespace tessera::tune
