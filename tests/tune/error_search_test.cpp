// Searches under a bound on the output error: the searches on functions that are known, the trial against plain sums,
// and what the tuners write against the bounds.
#include "tune/error_search.h"

#include <gtest/gtest.h>

#include <cmath>

#include "model/random_model.h"
#include "tune/prompts.h"
#include "tune/tuner.h"

namespace tessera::tune {
namespace {

TEST(ErrorSearch, BisectionLooksAtTheStartFirstAndEndsWithinTheTolerance) {
  std::vector<double> seen;
  const double found = least_accepted(0, 50, 20, 0.1, [&](double x) {
    seen.push_back(x);
    return x >= 31.4;
  });
  EXPECT_EQ(seen[0], 20);
  EXPECT_EQ(seen[1], 35);  // between 20, refused, and the end
  EXPECT_GE(found, 31.4);
  EXPECT_LE(found, 31.5);
  EXPECT_EQ(least_accepted(0, 1, 0.1, 1e-3, [](double) { return false; }), 1);
  EXPECT_LE(least_accepted(0, 1, 0.1, 1e-3, [](double) { return true; }), 1e-3);
}

TEST(ErrorSearch, HalvesUntilAcceptedOrTooSmall) {
  EXPECT_EQ(halve_until(0.008, 1e-4, [](double) { return true; }), 0.008);
  EXPECT_EQ(halve_until(0.008, 1e-4, [](double x) { return x <= 0.002; }), 0.002);
  int asked = 0;
  EXPECT_EQ(halve_until(0.008, 1e-4,
                        [&](double) {
                          ++asked;
                          return false;
                        }),
            0);
  EXPECT_EQ(asked, 7);  // 0.008 / 2^6 = 1.25e-4 is the last one above the limit
}

TEST(ErrorSearch, TheBinWithMostSparsityGivesItsMaxima) {
  // Bins of 0.125 from -1 on: {-1, -0.9375} and {0.5, 0.5625}; the second one has more sparsity in all.
  const std::vector<SpargePoint> points{
      {-1, 0.9, 40, 0.5}, {-0.9375, 0.8, 30, 0.2}, {0.5, 0.3, 10, 0.4}, {0.5625, 0.6, 5, 0.4}};
  const SpargePoint merged = merge_points(points, 0.125, 0.1);
  EXPECT_EQ(merged.theta, 0.5625);
  EXPECT_EQ(merged.cdf, 0.6);
  EXPECT_EQ(merged.lambda, 10);
  EXPECT_DOUBLE_EQ(merged.sparsity, 0.375);
  const SpargePoint dense = merge_points(points, 0.125, 0.375);
  EXPECT_EQ(dense.theta, 1);
  EXPECT_EQ(dense.cdf, 1);
  EXPECT_EQ(merge_points({}, 0.125, 0.1).theta, 1);
}

const Model& random_model() {
  static const Model model = [] {
    const testing::RandomModel random({.max_positions = 4096});
    const testing::TemporaryFolder folder;
    random.write(folder);
    return Model::load(folder.path());
  }();
  return model;
}

TuningTask task_of(std::int64_t length) {
  TuningTask task;
  task.model = &random_model();
  task.length = length;
  return task;
}

TEST(ErrorSearch, ATrialComparesOneHeadWithDense) {
  const TuningTask task = task_of(300);
  const auto tokens = calibration_prompts(random_model(), "", 300, 1, 0)[0];
  for_each_layer(task, tokens, "test", [&](std::int64_t, const LayerTensors& tensors) {
    const Problem& problem = tensors.problem;
    for (std::int64_t head = 0; head < problem.q_heads; ++head) {
      const HeadTrial trial(tensors, head, {});
      EXPECT_EQ(trial.run("dense", Json::object()).rel_l1, 0);
      EXPECT_EQ(trial.run("dense", Json::object()).sparsity, 0);
      const HeadOutcome outcome = trial.run("window", {{"left", 9}});
      // Outputs of both in float64, from the queries and keys of this head.
      double difference = 0;
      double whole = 0;
      const std::int64_t kv = head / problem.group();
      for (std::int64_t n = 0; n < 300; ++n) {
        std::vector<double> sums(2, 0.0);
        std::vector<std::vector<double>> o(2, std::vector<double>(static_cast<std::size_t>(problem.value_dim), 0.0));
        for (std::int64_t j = 0; j <= n; ++j) {
          double score = 0;
          for (std::int64_t d = 0; d < problem.head_dim; ++d) {
            score += static_cast<double>(tensors.q[(head * 300 + n) * problem.head_dim + d]) *
                     tensors.k[(kv * 300 + j) * problem.head_dim + d];
          }
          const double p = std::exp(score * problem.softmax_scale());
          for (const int i : {0, 1}) {
            if (i == 1 && n - j > 9) continue;
            sums[i] += p;
            for (std::int64_t d = 0; d < problem.value_dim; ++d) {
              o[i][d] += p * tensors.v[(kv * 300 + j) * problem.value_dim + d];
            }
          }
        }
        for (std::int64_t d = 0; d < problem.value_dim; ++d) {
          difference += std::fabs(o[0][d] / sums[0] - o[1][d] / sums[1]);
          whole += std::fabs(o[0][d] / sums[0]);
        }
      }
      EXPECT_NEAR(outcome.l1, difference, 1e-3 * difference);
      EXPECT_NEAR(outcome.rel_l1, difference / whole, 1e-3);
      EXPECT_NEAR(outcome.sparsity, 1 - (300 * 10 - 45) / (300 * 301 / 2.0), 1e-9);
    }
  });
}

TEST(ErrorSearch, SaleThresholdsMeetTheBoundAndTheirDoublesDoNot) {
  const double bound = 0.1;
  const Json document = tune("sale", task_of(1100), R"({"error": 0.1})");
  const auto tokens = calibration_prompts(random_model(), "", 1100, 1, 0)[0];
  int halved = 0;
  for_each_layer(task_of(1100), tokens, "test", [&](std::int64_t layer, const LayerTensors& tensors) {
    for (std::int64_t head = 0; head < tensors.problem.q_heads; ++head) {
      const double threshold = document["parameters"]["thresholds"][layer][head].get<double>();
      const HeadTrial trial(tensors, head, {});
      const auto accepted = [&](double x) { return trial.run("sale", {{"threshold", x}}).l1 < bound * 1100; };
      if (threshold > 0) {
        EXPECT_TRUE(accepted(threshold));
      }
      if (threshold > 0 && threshold < 0.008) {
        EXPECT_FALSE(accepted(threshold * 2));
        ++halved;
      }
      EXPECT_TRUE(threshold == 0 || std::remainder(std::log2(0.008 / threshold), 1.0) == 0) << threshold;
    }
  });
  RecordProperty("halved", halved);
}

TEST(ErrorSearch, SpargeKeepsTheErrorOfEveryHeadBelowItsBound) {
  // Points of one theta: each is within the bound; merged maxima of a bin of width 2/16 hold one point here.
  const Json document =
      tune("sparge", task_of(700),
           R"({"thetas": 1, "block_q": 32, "block_k": 16, "skip_rows": 16, "l1": 0.2, "pv_l1": 0.3})");
  const auto tokens = calibration_prompts(random_model(), "", 700, 1, 0)[0];
  int sparse = 0;
  for_each_layer(task_of(700), tokens, "test", [&](std::int64_t layer, const LayerTensors& tensors) {
    for (std::int64_t head = 0; head < tensors.problem.q_heads; ++head) {
      Json parameters = document["parameters"]["heads"][layer][head];
      sparse += parameters["theta"].get<double>() < 1 ? 1 : 0;
      parameters.update({{"block_q", 32}, {"block_k", 16}, {"skip_rows", 16}});
      EXPECT_LT(HeadTrial(tensors, head, {}).run("sparge", parameters).rel_l1, 0.3);
    }
  });
  EXPECT_GT(sparse, 0);
}

}  // namespace
}  // namespace tessera::tune
