// Parts of layers against their definitions: windows, methods within windows, experts, rotary scalings.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "model/layers/feed_forward.h"
#include "model/layers/layer_method.h"
#include "model/rope.h"

namespace tessera::model {
namespace {

Problem problem_of_rows(std::int64_t rows, std::int64_t keys) {
  Problem problem;
  problem.q_heads = 2;
  problem.kv_heads = 1;
  problem.q_len = rows;
  problem.kv_len = keys;
  problem.head_dim = problem.value_dim = 8;
  problem.causal = true;
  return problem;
}

struct Lengths {
  std::int64_t rows;
  std::int64_t keys;
};

TEST(WindowPlanTest, HoldsTheWindowAndNothingElse) {
  for (const auto& [rows, keys] :
       {Lengths{1, 1}, Lengths{1, 300}, Lengths{300, 300}, Lengths{130, 301}, Lengths{7, 20}}) {
    const Problem problem = problem_of_rows(rows, keys);
    for (const std::int64_t window : {1, 2, 16, 127, 128, 129, 299, 1000}) {
      const Plan plan = window_plan(problem, window, 128, 128);
      EXPECT_NO_THROW(validate(plan));
      const auto mask = dense_mask(plan);
      for (std::int64_t row = 0; row < rows; ++row) {
        const std::int64_t position = keys - rows + row;
        for (std::int64_t key = 0; key < keys; ++key) {
          const bool seen = key <= position && key > position - window;
          ASSERT_EQ(mask[static_cast<std::size_t>(row * keys + key)] != 0, seen)
              << window << ": " << row << ", " << key;
        }
      }
    }
  }
}

struct Tensors {
  explicit Tensors(const Problem& problem) {
    std::mt19937_64 generator(3);
    for (auto* values : {&q, &k, &v}) {
      const std::int64_t rows = values == &q ? problem.q_len * problem.q_heads : problem.kv_len;
      values->resize(static_cast<std::size_t>(rows * 8));
      for (float& x : *values) x = static_cast<float>(static_cast<double>(generator() >> 11) * 0x1p-51 - 2);
    }
    inputs.q = view_of(q.data(), DType::f32, {1, problem.q_heads, problem.q_len, 8});
    inputs.k = view_of(k.data(), DType::f32, {1, 1, problem.kv_len, 8});
    inputs.v = view_of(v.data(), DType::f32, {1, 1, problem.kv_len, 8});
  }
  std::vector<float> q, k, v;
  AttentionInputs inputs;
};

TEST(LayerMethodTest, IntersectsThePlanWithTheWindow) {
  const Problem problem = problem_of_rows(400, 400);
  const Tensors tensors(problem);
  const auto method = make_method("streaming:n_init=100,n_local=200");
  const LayerMethod within(*method, 250, 0);
  const auto mask = dense_mask(within.plan(problem, tensors.inputs, {}));
  for (std::int64_t row = 0; row < 400; ++row) {
    for (std::int64_t key = 0; key < 400; ++key) {
      const bool chosen = key <= row && (key < 100 || row - key < 200);
      const bool seen = chosen && row - key < 250;
      ASSERT_EQ(mask[static_cast<std::size_t>(row * 400 + key)] != 0, seen) << row << ", " << key;
    }
  }
}

TEST(LayerMethodTest, KeepsTheNearestKeysOfTheWindow) {
  // Far from the sinks nothing that this method chooses but 1 key lies within the window.
  const Problem problem = problem_of_rows(300, 300);
  const Tensors tensors(problem);
  const auto method = make_method("streaming:n_init=4,n_local=1");
  const auto mask = dense_mask(LayerMethod(*method, 100, 0).plan(problem, tensors.inputs, {}));
  for (std::int64_t row = 0; row < 300; ++row) {
    for (std::int64_t key = 0; key <= row; ++key) {
      const bool seen = row - key < 64 || (key < 4 && row - key < 100);
      ASSERT_EQ(mask[static_cast<std::size_t>(row * 300 + key)] != 0, seen) << row << ", " << key;
    }
  }
}

TEST(LayerMethodTest, WithinTheWindowItIsTheMethod) {
  const Problem problem = problem_of_rows(100, 100);
  const Tensors tensors(problem);
  const auto method = make_method("xattention");
  EXPECT_EQ(LayerMethod(*method, 100, 0).plan(problem, tensors.inputs, {}), method->plan(problem, tensors.inputs, {}));
}

TEST(LayerMethodTest, PartsOfAPromptReachBeyondTheWindow) {
  const auto tile = [](const char* spec, std::int64_t window) {
    const auto method = make_method(spec);
    return LayerMethod(*method, window, 0).prefill_tile();
  };
  EXPECT_EQ(tile("dense", 0), 1);
  EXPECT_EQ(tile("dense", 100), 1);
  EXPECT_EQ(tile("xattention:block=32", 0), 32);
  EXPECT_EQ(tile("xattention:block=32", 96), 128);
  EXPECT_EQ(tile("flexprefill", 100), 0);
  // The nearest keys, which a selection has beside its own, come in where the window begins to leave keys out.
  const auto method = make_method("streaming:n_init=4,n_local=1");
  const LayerMethod within(*method, 100, 0);
  EXPECT_EQ(within.prefill_tile(), 101);
  const auto pairs = [&](std::int64_t part) {
    std::vector<std::vector<std::uint8_t>> rows;
    for (std::int64_t first = 0; first < 303; first += part) {
      const std::int64_t count = std::min<std::int64_t>(part, 303 - first);
      const Problem problem = problem_of_rows(count, first + count);
      const Tensors tensors(problem);
      const auto mask = dense_mask(within.plan(problem, tensors.inputs, {}));
      for (std::int64_t row = 0; row < count; ++row) {
        const auto begin = mask.begin() + row * problem.kv_len;
        rows.emplace_back(begin, begin + first + row + 1);
      }
    }
    return rows;
  };
  EXPECT_TRUE(pairs(101) == pairs(303));
  EXPECT_FALSE(pairs(50) == pairs(303));
}

TEST(LayerMethodTest, CapsScoresInsideAndOutsideWindows) {
  const Problem problem = problem_of_rows(150, 150);
  Tensors tensors(problem);
  const auto method = make_method("dense");
  for (const std::int64_t window : {0, 40}) {
    std::vector<float> actual(static_cast<std::size_t>(2 * 150 * 8));
    const auto view = mutable_view_of(actual.data(), DType::f32, {1, 2, 150, 8});
    LayerMethod(*method, window, 1.5F).attend(problem, tensors.inputs, {view, {}}, {}, nullptr);
    double worst = 0;
    for (std::size_t head = 0; head < 2; ++head) {
      for (std::size_t row = 0; row < 150; ++row) {
        std::vector<double> sum(8);
        double weights = 0;
        for (std::size_t key = 0; key <= row; ++key) {
          if (window > 0 && row - key >= static_cast<std::size_t>(window)) continue;
          double score = 0;
          for (std::size_t i = 0; i < 8; ++i) {
            score += static_cast<double>(tensors.q[(head * 150 + row) * 8 + i]) *
                     static_cast<double>(tensors.k[key * 8 + i]);
          }
          const double weight = std::exp(1.5 * std::tanh(score / std::sqrt(8.0) / 1.5));
          weights += weight;
          for (std::size_t i = 0; i < 8; ++i) sum[i] += weight * static_cast<double>(tensors.v[key * 8 + i]);
        }
        for (std::size_t i = 0; i < 8; ++i) {
          worst = std::max(worst, std::abs(sum[i] / weights - static_cast<double>(actual[(head * 150 + row) * 8 + i])));
        }
      }
    }
    EXPECT_LT(worst, 1e-5) << window;
  }
}

TEST(LayerMethodTest, EveryMethodRunsWithinAWindow) {
  const Problem problem = problem_of_rows(160, 200);
  const Tensors tensors(problem);
  for (const MethodEntry& entry : methods()) {
    if (!entry.info.phases.prefill || !entry.info.domain.contains(problem)) continue;
    if (std::any_of(entry.info.side.begin(), entry.info.side.end(), [](const auto& side) { return side.required; }))
      continue;
    const auto method = entry.make("{}");
    const auto state = method->new_state();
    PlanContext context;
    context.state = state.get();
    Plan executed;
    std::vector<float> out(static_cast<std::size_t>(2 * 160 * 8), NAN);
    const auto view = mutable_view_of(out.data(), DType::f32, {1, 2, 160, 8});
    try {
      LayerMethod(*method, 90, 0).attend(problem, tensors.inputs, {view, {}}, context, &executed);
    } catch (const Error& error) {
      ADD_FAILURE() << entry.info.name << ": " << error.what();
      continue;
    }
    const auto mask = dense_mask(executed);
    for (std::int64_t row = 0; row < 160; ++row) {
      std::int64_t count = 0;
      for (std::int64_t key = 0; key < 200; ++key) {
        if (mask[static_cast<std::size_t>(row * 200 + key)] == 0) continue;
        ++count;
        ASSERT_TRUE(key <= row + 40 && key > row + 40 - 90) << entry.info.name << ": " << row << ", " << key;
      }
      ASSERT_GE(count, std::min<std::int64_t>(64, row + 41)) << entry.info.name;
    }
    EXPECT_TRUE(std::all_of(out.begin(), out.end(), [](float x) { return std::isfinite(x); })) << entry.info.name;
  }
}

TEST(RoutingTest, TakesTheLargestAndGroupsByExpert) {
  const std::vector<float> scores{0, 2, 1, 2,   // row 0: experts 1 and 3 (equal)
                                  5, 1, 4, -3,  // row 1: experts 0 and 2
                                  1, 1, 1, 1};  // row 2: experts 0 and 1
  for (const bool normalise : {true, false}) {
    const Routing routing = route(scores, {.count = 4, .chosen = 2, .intermediate_size = 1, .normalise = normalise});
    EXPECT_THAT(routing.first, ::testing::ElementsAre(0, 2, 4, 5, 6));
    EXPECT_THAT(routing.rows, ::testing::ElementsAre(1, 2, 0, 2, 1, 0));
    const double e = std::exp(1.0);
    const double all = e * e * e * e * e + e + e * e * e * e + std::exp(-3.0);
    const double two = std::exp(5.0) + std::exp(4.0);
    EXPECT_NEAR(routing.weights[0], std::exp(5.0) / (normalise ? two : all), 1e-6);
    EXPECT_NEAR(routing.weights[4], std::exp(4.0) / (normalise ? two : all), 1e-6);
    EXPECT_NEAR(routing.weights[1], normalise ? 0.5 : 0.25, 1e-6);
  }
}

TEST(RopeScalingTest, DependsOnTheLengthWhereItShould) {
  RopeConfig config{.theta = 100, .scaling = RopeScaling::dynamic, .factor = 2, .original_positions = 50};
  const Rope dynamic(config, 8);
  EXPECT_EQ(dynamic.frequencies(50), Rope({.theta = 100}, 8).frequencies(1));
  // base * (2 * 100 / 50 - 1)^(8 / 6)
  const double base = 100 * std::pow(3.0, 8.0 / 6);
  EXPECT_NEAR(dynamic.frequencies(100)[3], std::pow(base, -6.0 / 8), 1e-12);
  config = {.theta = 100,
            .scaling = RopeScaling::longrope,
            .original_positions = 50,
            .attention_factor = 1.25,
            .short_factors = {1, 2, 3, 4},
            .long_factors = {5, 6, 7, 8}};
  const Rope longrope(config, 8);
  EXPECT_NEAR(longrope.frequencies(50)[1], std::pow(100.0, -0.25) / 2, 1e-12);
  EXPECT_NEAR(longrope.frequencies(51)[1], std::pow(100.0, -0.25) / 6, 1e-12);
  std::vector<float> table;
  longrope.tables(0, 1, 1, table);
  EXPECT_THAT(table, ::testing::ElementsAre(1.25F, 1.25F, 1.25F, 1.25F, 0, 0, 0, 0));
}

TEST(RopeScalingTest, PartialAndNeighbouringPairs) {
  const Rope partial({.theta = 10, .dims = 4}, 6);
  std::vector<float> table;
  partial.tables(3, 1, 4, table);
  std::vector<float> row{1, 2, 3, 4, 5, 6};
  partial.rotate(row.data(), 1, table.data());
  EXPECT_NEAR(row[0], std::cos(3.0) - 3 * std::sin(3.0), 1e-5);
  EXPECT_NEAR(row[2], std::sin(3.0) + 3 * std::cos(3.0), 1e-5);
  EXPECT_EQ(row[4], 5);
  EXPECT_EQ(row[5], 6);
  // Neighbours are the same rotation of other places.
  const Rope neighbours({.theta = 10, .interleaved = true}, 4);
  const Rope halves({.theta = 10}, 4);
  neighbours.tables(7, 1, 8, table);
  std::vector<float> a{1, 2, 3, 4};
  std::vector<float> b{1, 3, 2, 4};
  neighbours.rotate(a.data(), 1, table.data());
  halves.rotate(b.data(), 1, table.data());
  EXPECT_THAT(a, ::testing::ElementsAre(b[0], b[2], b[1], b[3]));
  neighbours.rotate_back(a.data(), 1, table.data());
  EXPECT_NEAR(a[1], 2, 1e-6);
}

}  // namespace
}  // namespace tessera::model
