// paro: the choice of the order, the static masks and their slots, and the 8-bit products.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>

#include "core/error.h"
#include "kernels/int8_reference.h"
#include "methods/diffusion/pooled_reference.h"
#include "score/axis_orders.h"
#include "score/token_order.h"

namespace tessera {
namespace {

using test::AttentionCase;
using test::Result;

AttentionCase on_grid(const TokenGrid& grid, std::uint32_t seed = 1) {
  AttentionCase input(
      {.name = "grid", .q_heads = 2, .kv_heads = 1, .q_len = grid.tokens(), .kv_len = grid.tokens(), .causal = false},
      seed);
  input.problem.grid = grid;
  return input;
}

/// Tokens of one group attend to each other and to nobody else; 16 groups.
AttentionCase grouped(const TokenGrid& grid, const std::function<std::int64_t(std::int64_t cell)>& group_of) {
  AttentionCase input = on_grid(grid);
  for (std::int64_t n = 0; n < grid.cells(); ++n) {
    for (std::int64_t d = 0; d < 16; ++d) {
      const float value = d == group_of(n) ? 8.0F : 0.0F;
      for (std::int64_t h = 0; h < 2; ++h) input.set_q(0, h, n, d, value);
      input.set_k(0, 0, n, d, value);
    }
  }
  return input;
}

TEST(Paro, ChoosesTheOrderThatGathersAttention) {
  const auto chosen = [](const AttentionCase& input) {
    const Plan plan = make_method("paro:block=16,density=0.0625")->plan(input.problem, input.inputs, {});
    EXPECT_NEAR(statistics(plan).density, 1.0 / 16, 1e-9);
    return plan.key_order.empty() ? std::vector<std::int32_t>{} : plan.key_order[0];
  };
  // The same pixel of all frames; the same row of a frame; the same column of a frame.
  const TokenGrid frames{{16, 4, 4}, 0, 0};
  EXPECT_EQ(chosen(grouped(frames, [](auto cell) { return cell % 16; })), score::axis_order(frames.extent, {1, 2, 0}));
  const TokenGrid columns{{4, 4, 16}, 0, 0};
  EXPECT_TRUE(chosen(grouped(columns, [](auto cell) { return cell / 16; })).empty());
  const TokenGrid rows{{4, 16, 4}, 0, 0};
  EXPECT_EQ(chosen(grouped(rows, [](auto cell) { return cell / 64 * 4 + cell % 4; })),
            score::axis_order(rows.extent, {0, 2, 1}));
}

TEST(Paro, GatheredBlocksHoldAllTheMass) {
  // At the density of the groups nothing is lost under the right order, much under the raster order.
  const TokenGrid grid{{16, 4, 4}, 0, 0};
  const AttentionCase input = grouped(grid, [](auto cell) { return cell % 16; });
  const Result dense = test::attend(*make_method("dense"), input);
  const Result sparse = test::attend(*make_method("paro:block=16,density=0.0625"), input);
  for (std::size_t i = 0; i < dense.o.size(); ++i) ASSERT_NEAR(sparse.o[i], dense.o[i], 1e-3);
}

TEST(Paro, MetricsAreThoseOfTheProbabilities) {
  const TokenGrid grid{{2, 3, 5}, 1, 3};
  const AttentionCase input = on_grid(grid);
  constexpr std::int64_t block = 8;
  const auto tiles = [&](std::size_t o) {
    return score::OrderedTiles(
        input.problem, 0, score::with_text(grid, score::axis_order(grid.extent, score::kAxisOrders[o])), block, block);
  };
  const std::array<score::OrderedTiles, 6> orders{tiles(0), tiles(1), tiles(2), tiles(3), tiles(4), tiles(5)};
  const auto metrics = score::axis_order_metrics(input.problem, input.inputs, orders, 1, block, 0.02, 0.7);
  const std::int64_t tokens = grid.tokens();
  for (std::size_t o = 0; o < 6; ++o) {
    const std::int64_t blocks = (tokens + block - 1) / block;
    double sparse = 0;
    double incoherence = 0;
    for (std::int64_t bi = 0; bi < blocks; ++bi) {
      for (std::int64_t bj = 0; bj < blocks; ++bj) {
        double sum = 0;
        double most = 0;
        int small = 0;
        int count = 0;
        for (std::int64_t i = bi * block; i < std::min((bi + 1) * block, tokens); ++i) {
          const auto p = input.probabilities(0, 1, orders[o].query_order()[i]);
          for (std::int64_t j = bj * block; j < std::min((bj + 1) * block, tokens); ++j) {
            const double x = p[orders[o].key_order()[j]];
            sum += x;
            most = std::max(most, x);
            small += x < 0.02 ? 1 : 0;
            ++count;
          }
        }
        EXPECT_NEAR(metrics[o].sums[bi * blocks + bj], sum, 1e-5);
        sparse += small >= 0.7 * count ? 1 : 0;
        incoherence += most / (sum / count);
      }
    }
    const auto all = static_cast<double>(blocks * blocks);
    EXPECT_NEAR(metrics[o].sparse, sparse / all, 1e-9) << o;
    EXPECT_NEAR(metrics[o].incoherence, incoherence / all, 1e-3) << o;
  }
}

TEST(Paro, MoreSparsityAndLessIncoherenceWin) {
  std::array<score::BlockMetrics, 6> metrics;
  for (auto& order : metrics) order = {.sparse = 0.5, .incoherence = 10, .sums = {}};
  metrics[4].sparse = 0.8;
  EXPECT_EQ(score::best_axis_order(metrics, 1), 4U);
  metrics[2].incoherence = 5;
  EXPECT_EQ(score::best_axis_order(metrics, 0), 2U);
  EXPECT_EQ(score::best_axis_order(metrics, 0.9), 4U);
}

TEST(Paro, MaskHasTheTargetDensity) {
  const AttentionCase input = on_grid({{4, 8, 8}, 0, 0});
  for (const double density : {0.2, 0.3, 0.5, 0.8}) {
    const Plan plan =
        make_method("paro:block=16,density=" + std::to_string(density))->plan(input.problem, input.inputs, {});
    for (const double head : statistics(plan).head_density) EXPECT_NEAR(head, density, 1.0 / 256 + 1e-9);
  }
}

TEST(Paro, KeepsTheLargestBlocksAndText) {
  const TokenGrid grid{{4, 4, 8}, 3, 13};
  const AttentionCase input = on_grid(grid);
  const auto mask = test::masks_of("paro:block=16,density=0.1", input)[0];
  for (std::int64_t n = 0; n < grid.tokens(); ++n) {
    int kept = 0;
    for (std::int64_t j = 0; j < grid.tokens(); ++j) {
      const bool text = n < 3 || n >= 131 || j < 3 || j >= 131;
      ASSERT_TRUE(!text || mask.at(n, j)) << n << ", " << j;
      kept += mask.at(n, j) ? 1 : 0;
    }
    EXPECT_GE(kept, 16);
  }
}

TEST(Paro, ARowKeepsItsLargestBlock) {
  const AttentionCase input = on_grid({{1, 1, 96}, 0, 0});
  const auto mask = test::masks_of("paro:block=16,density=0", input)[1];
  for (std::int64_t tile = 0; tile < 6; ++tile) {
    std::vector<double> sums(6, 0.0);
    for (std::int64_t n = tile * 16; n < tile * 16 + 16; ++n) {
      const auto p = input.probabilities(0, 1, n);
      for (std::int64_t j = 0; j < 96; ++j) sums[j / 16] += p[j];
    }
    for (std::int64_t j = 0; j < 96; ++j) {
      EXPECT_EQ(mask.at(tile * 16, j), sums[j / 16] == *std::max_element(sums.begin(), sums.end()))
          << tile << ", " << j;
    }
  }
}

TEST(Paro, StepsReadTheirSlot) {
  const auto method = make_method("paro:block=16,density=0.2,steps=20");
  const auto state = method->new_state();
  PlanContext context;
  context.state = state.get();
  const TokenGrid grid{{4, 4, 8}, 0, 0};
  std::vector<Plan> first_run;
  for (std::uint32_t step = 0; step < 20; ++step) {
    const AttentionCase input = on_grid(grid, step + 1);
    first_run.push_back(method->plan(input.problem, input.inputs, context));
    EXPECT_EQ(first_run.back().key_order, first_run.front().key_order) << "the order of a head is fixed";
  }
  int masks = 1;
  for (std::size_t step = 1; step < 20; ++step) masks += first_run[step] == first_run[step - 1] ? 0 : 1;
  EXPECT_EQ(masks, 10);
  for (std::size_t step = 10; step < 20; ++step) EXPECT_TRUE(first_run[step] == first_run[10]);
  // A second prompt is not looked at; another layer is calibrated for itself.
  const AttentionCase other = on_grid(grid, 100);
  for (std::size_t step = 0; step < 20; ++step) {
    EXPECT_TRUE(method->plan(other.problem, other.inputs, context) == first_run[step]) << step;
  }
  context.layer = 1;
  EXPECT_FALSE(method->plan(other.problem, other.inputs, context) == first_run[0]);
  context.layer = 0;
  const AttentionCase larger = on_grid({{4, 8, 8}, 0, 0});
  EXPECT_EQ(method->plan(larger.problem, larger.inputs, context).problem.kv_len, 256);
}

TEST(Paro, WholeMaskIsDenseAttention) {
  const AttentionCase input = on_grid({{3, 5, 7}, 4, 2});
  const Result dense = test::attend(*make_method("dense"), input);
  const Result result = test::attend(*make_method("paro:block=16,density=1"), input);
  for (std::size_t i = 0; i < dense.o.size(); ++i) ASSERT_NEAR(result.o[i], dense.o[i], 1e-5);
  for (std::size_t i = 0; i < dense.lse.size(); ++i) ASSERT_NEAR(result.lse[i], dense.lse[i], 1e-5);
}

TEST(Int8, IsAttentionOnIntegers) {
  // One tile: the whole computation written out with integers.
  const AttentionCase input = on_grid({{1, 4, 5}, 0, 0});
  const Problem& problem = input.problem;
  const Result result = test::attend(*make_method("paro:block=32,density=1,quantise=int8"), input);
  const auto level = [](double x, double scale) { return static_cast<std::int64_t>(std::round(x / scale)); };
  std::vector<double> mean(16, 0.0);
  double k_most = 0;
  for (std::int64_t d = 0; d < 16; ++d) {
    for (std::int64_t j = 0; j < 20; ++j) mean[d] += input.k(0, 0, j, d) / 20.0;
    for (std::int64_t j = 0; j < 20; ++j) k_most = std::max(k_most, std::abs(input.k(0, 0, j, d) - mean[d]));
  }
  for (std::int64_t h = 0; h < 2; ++h) {
    double q_most = 0;
    for (std::int64_t n = 0; n < 20; ++n) {
      for (std::int64_t d = 0; d < 16; ++d) q_most = std::max(q_most, std::abs(double{input.q(0, h, n, d)}));
    }
    for (std::int64_t n = 0; n < 20; ++n) {
      std::vector<double> scores;
      double shift = 0;
      for (std::int64_t d = 0; d < 16; ++d) shift += mean[d] * input.q(0, h, n, d) * problem.softmax_scale();
      for (std::int64_t j = 0; j < 20; ++j) {
        std::int64_t dot = 0;
        for (std::int64_t d = 0; d < 16; ++d) {
          dot += level(input.q(0, h, n, d), q_most / 127) * level(input.k(0, 0, j, d) - mean[d], k_most / 127);
        }
        scores.push_back(static_cast<double>(dot) * q_most / 127 * k_most / 127 * problem.softmax_scale());
      }
      const double most = *std::max_element(scores.begin(), scores.end());
      double sum = 0;
      for (const double score : scores) sum += std::exp(score - most);
      EXPECT_NEAR(result.lse[h * 20 + n], most + std::log(sum) + shift, 1e-3);
      for (std::int64_t e = 0; e < 8; ++e) {
        double v_most = 0;
        for (std::int64_t j = 0; j < 20; ++j) {
          v_most = std::max(v_most, std::abs(double{load_as_float(input.inputs.v.row(0, 0, j), DType::f32, e)}));
        }
        std::int64_t total = 0;
        for (std::int64_t j = 0; j < 20; ++j) {
          total += level(std::exp(scores[j] - most), 1.0 / 127) *
                   level(load_as_float(input.inputs.v.row(0, 0, j), DType::f32, e), v_most / 127);
        }
        // A level of a probability or a value may fall to the other side of a half in float.
        EXPECT_NEAR(result.o[(h * 20 + n) * 8 + e], static_cast<double>(total) / 127 * v_most / 127 / sum, 0.02);
      }
    }
  }
}

TEST(Int8, IsCloseToFloatOnPermutedSparsePlans) {
  for (const TokenGrid& grid : {TokenGrid{{4, 6, 8}, 5, 3}, TokenGrid{{16, 4, 4}, 0, 0}}) {
    const AttentionCase input = on_grid(grid);
    const Result exact = test::attend(*make_method("paro:block=16,density=0.4"), input);
    const Result result = test::attend(*make_method("paro:block=16,density=0.4,quantise=int8"), input);
    EXPECT_TRUE(result.plan == exact.plan);
    double difference = 0;
    double norm = 0;
    for (std::size_t i = 0; i < exact.o.size(); ++i) {
      difference += std::pow(result.o[i] - exact.o[i], 2);
      norm += std::pow(exact.o[i], 2);
    }
    EXPECT_LT(std::sqrt(difference / norm), 0.04);
    EXPECT_GT(difference, 0);
    for (std::size_t i = 0; i < exact.lse.size(); ++i) ASSERT_NEAR(result.lse[i], exact.lse[i], 0.06);
    const testing::Int8Result emulated = testing::int8_reference(result.plan, input.inputs);
    for (std::size_t i = 0; i < exact.o.size(); ++i) {
      ASSERT_NEAR(result.o[i], emulated.o[i], 2 * emulated.level[i / 8] + 1e-5) << i;
    }
    EXPECT_EQ(result.o,
              test::attend(*make_method("paro:block=16,density=0.4,quantise=int8"), input, KernelKind::automatic, 1).o);
  }
}

TEST(Paro, RefusesCausalityAndVariableLengths) {
  const AttentionCase causal({.name = "causal", .q_len = 40, .kv_len = 40});
  EXPECT_THROW(make_method("paro")->plan(causal.problem, causal.inputs, {}), Error);
  const AttentionCase lengths({.name = "lengths", .causal = false, .q_lens = {20, 30}, .kv_lens = {20, 30}});
  EXPECT_THROW(make_method("paro")->plan(lengths.problem, lengths.inputs, {}), Error);
  EXPECT_THROW(make_method("paro:quantise=int4"), Error);
}

}  // namespace
}  // namespace tessera
