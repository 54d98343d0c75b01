// Recall of the constructed model, end to end through plans and kernels.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "eval/induction.h"
#include "eval/mqar.h"

namespace tessera::eval {
namespace {

constexpr std::int64_t kTileKeys = 64;

const float* row_of(const TensorView& view, std::int64_t row) {
  return reinterpret_cast<const float*>(view.row(0, 0, row));
}

/// Importance of each key tile that a query at `position` sees.
using TileScores = std::function<std::vector<float>(const AttentionInputs&, std::int64_t position)>;

std::vector<float> tile_scores(const AttentionInputs& inputs, std::int64_t position, bool largest) {
  const std::int64_t dim = inputs.q.dim();
  std::vector<float> scores(position / kTileKeys + 1, largest ? -2.0F : 0.0F);
  for (std::int64_t j = 0; j <= position; ++j) {
    const float* q = row_of(inputs.q, position);
    const float score = std::inner_product(q, q + dim, row_of(inputs.k, j), 0.0F);
    float& tile = scores[j / kTileKeys];
    tile = largest ? std::max(tile, score) : tile + score / static_cast<float>(kTileKeys);
  }
  return scores;
}

std::vector<float> largest_score(const AttentionInputs& inputs, std::int64_t position) {
  return tile_scores(inputs, position, true);
}
std::vector<float> pooled_score(const AttentionInputs& inputs, std::int64_t position) {
  return tile_scores(inputs, position, false);
}
/// First tile, then the nearest.
std::vector<float> sink_and_window(const AttentionInputs&, std::int64_t position) {
  std::vector<float> scores(position / kTileKeys + 1);
  std::iota(scores.begin(), scores.end(), 0.0F);
  scores[0] = 1e9F;
  return scores;
}

/// The best `budget` of the key tiles for each of the queries; no other query is computed.
Attend select_tiles(const std::vector<std::int64_t>& queries, const TileScores& score, double budget) {
  return attend_by_plan([=](const Problem& problem, const AttentionInputs& inputs) {
    PlanBuilder builder(problem, 1, kTileKeys, 1, 1);
    builder.set_query_order(0, {queries.begin(), queries.end()});
    for (const std::int64_t position : queries) {
      const std::vector<float> scores = score(inputs, position);
      std::vector<std::int64_t> tiles(scores.size());
      std::iota(tiles.begin(), tiles.end(), 0);
      std::stable_sort(tiles.begin(), tiles.end(), [&](auto a, auto b) { return scores[a] > scores[b]; });
      tiles.resize(std::max<std::int64_t>(1, std::llround(budget * static_cast<double>(tiles.size()))));
      std::sort(tiles.begin(), tiles.end());
      for (const std::int64_t tile : tiles) {
        builder.tiles(tile, 1, tile == position / kTileKeys ? EntryMask::band : EntryMask::none);
      }
      builder.end_row();
    }
    Plan plan = std::move(builder).finish();
    validate(plan);
    return plan;
  });
}

const Attend& dense() {
  static const Attend attend =
      attend_by_plan([](const Problem& problem, const AttentionInputs&) { return dense_plan(problem); });
  return attend;
}

/// Dense attention of these queries; no other query is computed.
Attend dense_at(const std::vector<std::int64_t>& queries) {
  return attend_by_plan([=](const Problem& problem, const AttentionInputs&) {
    PlanBuilder builder(problem, 1, kTileKeys, 1, 1);
    builder.set_query_order(0, {queries.begin(), queries.end()});
    for (const std::int64_t position : queries) {
      builder.run(0, position + 1);
      builder.end_row();
    }
    return std::move(builder).finish();
  });
}

class Recall : public testing::TestWithParam<std::pair<std::int64_t, std::int64_t>> {
 protected:
  Recall() : task_(make_mqar({.length = GetParam().first, .pairs = GetParam().second, .queries = 64, .seed = 5})) {}
  double accuracy(const Attend& layer2) {
    // Layer 1 is the same in every run of a task: compute it once.
    const Attend layer1 = [this](const Problem& problem, const AttentionInputs& inputs,
                                 const AttentionOutputs& outputs) {
      auto* o = static_cast<float*>(outputs.o.data);
      if (previous_.empty()) {
        dense()(problem, inputs, outputs);
        previous_.assign(o, o + problem.q_len * problem.value_dim);
      }
      std::copy(previous_.begin(), previous_.end(), o);
    };
    return mqar_accuracy(task_, model_.predict(task_.tokens, task_.query_positions, layer1, layer2));
  }
  double accuracy(const TileScores& score, double budget) {
    return accuracy(select_tiles(task_.query_positions, score, budget));
  }

  InductionModel model_;
  MqarTask task_;
  std::vector<float> previous_;
};

TEST_P(Recall, DenseFindsEverythingAndASelectionWhatItKeeps) {
  EXPECT_EQ(accuracy(dense_at(task_.query_positions)), 1.0);
  const double largest = accuracy(largest_score, 0.1);
  const double pooled = accuracy(pooled_score, 0.1);
  const double pooled_half = accuracy(pooled_score, 0.5);
  const double window = accuracy(sink_and_window, 0.1);
  RecordProperty("pooled", std::to_string(pooled));
  RecordProperty("pooled_half", std::to_string(pooled_half));
  RecordProperty("window", std::to_string(window));
  EXPECT_EQ(largest, 1.0);
  EXPECT_EQ(accuracy(pooled_score, 1), 1.0);
  EXPECT_GT(pooled, 0.1);
  EXPECT_LT(pooled, 0.8);
  EXPECT_GT(pooled_half, pooled);
  EXPECT_LT(pooled_half, 1);
  EXPECT_LT(window, 0.6);
}

INSTANTIATE_TEST_SUITE_P(Mqar, Recall,
                         testing::Values(std::pair<std::int64_t, std::int64_t>{1024, 64},
                                         std::pair<std::int64_t, std::int64_t>{4096, 256},
                                         std::pair<std::int64_t, std::int64_t>{16384, 1024}),
                         [](const auto& instance) { return std::to_string(instance.param.first) + "_tokens"; });

TEST(InductionModel, MethodsRunInItsLayers) {
  const InductionModel model;
  const MqarTask task = make_mqar({.length = 512, .pairs = 32, .queries = 32, .seed = 2});
  const auto exact = make_method("dense");
  const auto local = make_method("streaming:n_init=16,n_local=32");
  const Attend layer1 = attend_by_method(*exact, 0);
  EXPECT_EQ(mqar_accuracy(task, model.predict(task.tokens, task.query_positions, layer1, attend_by_method(*exact, 1))),
            1.0);
  // The previous token is local, so a window serves layer 1; recall is not, so it fails in layer 2.
  EXPECT_EQ(mqar_accuracy(task, model.predict(task.tokens, task.query_positions, attend_by_method(*local, 0),
                                              attend_by_method(*exact, 1))),
            1.0);
  EXPECT_LT(mqar_accuracy(task, model.predict(task.tokens, task.query_positions, layer1, attend_by_method(*local, 1))),
            0.6);
}

TEST(InductionModel, RefusesUnknownTokens) {
  const InductionModel model({.vocabulary = 16});
  const std::vector<std::int32_t> tokens = {1, 16};
  const std::vector<std::int64_t> at = {1};
  EXPECT_THROW(model.predict(tokens, at, dense(), dense()), Error);
  EXPECT_THROW(model.predict(std::vector<std::int32_t>{1}, at, dense(), dense()), Error);
}

}  // namespace
}  // namespace tessera::eval
