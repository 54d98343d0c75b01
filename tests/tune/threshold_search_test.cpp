// The search for thresholds: what it says a threshold keeps is what the method keeps; the program against all choices.
#include "tune/threshold_search.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "io/json.h"
#include "tessera/eval.h"
#include "tessera/method.h"

namespace tessera::tune {
namespace {

HeadData heads_of(std::int64_t tokens) {
  HeadOptions options;
  options.tokens = tokens;
  options.q_heads = 4;
  options.kv_heads = 2;
  options.head_dim = 32;
  options.seed = 4;
  return make_heads(options);
}

AttentionInputs inputs_of(const HeadData& data) {
  AttentionInputs inputs;
  inputs.q = data.q();
  inputs.k = data.k();
  inputs.v = data.v();
  return inputs;
}

/// LSE of all heads under a method.
std::vector<float> lse_of(const Method& method, const HeadData& data) {
  const Problem& problem = data.problem;
  std::vector<float> o(problem.q_heads * problem.q_len * problem.value_dim);
  std::vector<float> lse(problem.q_heads * problem.q_len);
  method.attend(problem, inputs_of(data),
                {mutable_view_of(o.data(), DType::f32, {1, problem.q_heads, problem.q_len, problem.value_dim}), lse},
                {});
  return lse;
}

TEST(Thresholds, KeepWhatTheMethodKeeps) {
  const HeadData data = heads_of(1000);
  const TileScoring scoring{.stride = 8, .block = 64, .norm = 1};
  const std::vector<double> thresholds{1, 0.8, 0.3, 0};
  const auto outcome = outcome_of_thresholds(data.problem, inputs_of(data), scoring, thresholds);
  const auto dense = lse_of(*make_method("dense"), data);
  for (std::size_t i = 0; i < thresholds.size(); ++i) {
    const auto method = make_method("xattention:stride=8,block=64,tau=" + std::to_string(thresholds[i]));
    const auto lse = lse_of(*method, data);
    const auto density = statistics(method->plan(data.problem, inputs_of(data), {})).head_density;
    for (std::size_t head = 0; head < 4; ++head) {
      double mass = 0;
      for (std::size_t row = head * 1000; row < (head + 1) * 1000; ++row) {
        mass += std::exp(static_cast<double>(lse[row]) - static_cast<double>(dense[row])) / 1000;
      }
      const std::size_t at = head * thresholds.size() + i;
      EXPECT_NEAR(outcome.mass[at], mass, 1e-3) << "head " << head << ", threshold " << thresholds[i];
      // Of tiles here, of pairs there.
      EXPECT_NEAR(outcome.density[at], density[head], 0.06);
    }
  }
}

TEST(Thresholds, ProfileFollowsItsDefinition) {
  const HeadData data = heads_of(700);
  const AttentionInputs inputs = inputs_of(data);
  // With stride 1 scores are exact masses, so that the needed tiles are those with the largest scores.
  const auto found = profiled_thresholds(data.problem, inputs, {.stride = 1, .block = 64, .norm = 1}, 0.9, 2);
  for (std::size_t head = 0; head < 4; ++head) {
    double held = 0;
    for (std::int64_t first = 0; first < 700; first += 64) {
      std::vector<double> tiles(11);
      for (std::int64_t i = first; i < std::min<std::int64_t>(first + 64, 700); ++i) {
        std::vector<double> weights;
        for (std::int64_t j = 0; j <= i; ++j) {
          double score = 0;
          for (std::int64_t d = 0; d < 32; ++d) {
            score +=
                static_cast<double>(load_as_float(inputs.q.row(0, static_cast<std::int64_t>(head), i), DType::f32, d)) *
                load_as_float(inputs.k.row(0, static_cast<std::int64_t>(head / 2), j), DType::f32, d);
          }
          weights.push_back(std::exp(score * data.problem.softmax_scale()));
        }
        const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
        for (std::size_t j = 0; j < weights.size(); ++j) tiles[j / 64] += weights[j] / total;
      }
      std::sort(tiles.rbegin(), tiles.rend());
      const double wanted = 0.9 * std::accumulate(tiles.begin(), tiles.end(), 0.0);
      for (double sum = 0; const double tile : tiles) {
        if (sum >= wanted) break;
        sum += tile;
        held += tile;
      }
    }
    EXPECT_NEAR(found[head], held / 700, 2e-3) << "head " << head;
  }
  const auto all = profiled_thresholds(data.problem, inputs, {.stride = 16, .block = 64, .norm = 1}, 1);
  for (const double threshold : all) EXPECT_NEAR(threshold, 1, 1e-6);
}

TEST(Thresholds, ProgramEqualsAllChoices) {
  std::mt19937 random(8);
  std::uniform_real_distribution<double> drop(0, 0.2);
  for (int round = 0; round < 20; ++round) {
    std::vector<std::vector<double>> quality;
    for (int head = 0; head < 4; ++head) {
      std::vector<double> steps{1};
      for (int i = 0; i < 4; ++i) steps.push_back(steps.back() - drop(random));
      quality.push_back(steps);
    }
    for (const std::int64_t most : {0, 3, 9, 50}) {
      // The most steps whose best sum is good enough, by trying everything.
      std::int64_t steps = 0;
      double best = 4;
      for (int code = 0; code < 5 * 5 * 5 * 5; ++code) {
        double sum = 0;
        std::int64_t count = 0;
        for (int head = 0, rest = code; head < 4; ++head, rest /= 5) {
          sum += quality[head][rest % 5];
          count += rest % 5;
        }
        if (count > most || sum < 0.85 * 4) continue;
        if (count > steps || (count == steps && sum > best)) {
          steps = count;
          best = sum;
        }
      }
      const auto lowered = lower_thresholds(quality, most, 0.85);
      double sum = 0;
      for (std::size_t head = 0; head < 4; ++head) sum += quality[head][static_cast<std::size_t>(lowered[head])];
      EXPECT_EQ(std::accumulate(lowered.begin(), lowered.end(), std::int64_t{0}), steps);
      if (steps > 0) {
        EXPECT_NEAR(sum, best, 1e-12);
      }
    }
  }
  // A head that does not care takes all the steps.
  EXPECT_EQ(lower_thresholds({{1, 0.5, 0.2}, {1, 1, 1}}, 2, 1), (std::vector<std::int64_t>{0, 2}));
  EXPECT_THROW(lower_thresholds({}, 2, 1), Error);
}

}  // namespace
}  // namespace tessera::tune
