// The search for elastic spans: influence against the change of the loss itself, the solver against all assignments.
#include "tune/span_search.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "core/error.h"

namespace tessera::tune {
namespace {

constexpr std::int64_t kLength = 150;
constexpr std::int64_t kDim = 8;
constexpr std::int64_t kValueDim = 6;

/// One causal sequence with two query heads on one kv head, and a gradient of the loss.
struct Sample {
  std::vector<float> q, k, v, grad;
  Problem problem;
  AttentionInputs inputs;
  TensorView grad_o;

  explicit Sample(std::uint32_t seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<float>& values, std::int64_t size, float factor) {
      for (std::int64_t i = 0; i < size; ++i) values.push_back(factor * normal(random));
    };
    fill(q, 2 * kLength * kDim, 2);
    fill(k, kLength * kDim, 1);
    fill(v, kLength * kValueDim, 1);
    fill(grad, 2 * kLength * kValueDim, 1);
    problem.q_heads = 2;
    problem.q_len = problem.kv_len = kLength;
    problem.head_dim = kDim;
    problem.value_dim = kValueDim;
    problem.causal = true;
    inputs.q = view_of(q.data(), DType::f32, {1, 2, kLength, kDim});
    inputs.k = view_of(k.data(), DType::f32, {1, 1, kLength, kDim});
    inputs.v = view_of(v.data(), DType::f32, {1, 1, kLength, kValueDim});
    grad_o = view_of(grad.data(), DType::f32, {1, 2, kLength, kValueDim});
  }

  /// sum of grad . output over one row, with one key masked (-1: none).
  double loss_of_row(std::int64_t head, std::int64_t i, std::int64_t masked) const {
    double total = 0;
    double loss = 0;
    for (std::int64_t j = 0; j <= i; ++j) {
      if (j == masked) continue;
      double score = 0;
      for (std::int64_t d = 0; d < kDim; ++d) score += double{q[(head * kLength + i) * kDim + d]} * k[j * kDim + d];
      const double weight = std::exp(score * problem.softmax_scale());
      total += weight;
      for (std::int64_t d = 0; d < kValueDim; ++d) {
        loss += weight * grad[(head * kLength + i) * kValueDim + d] * v[j * kValueDim + d];
      }
    }
    return total == 0 ? 0 : loss / total;
  }
};

TEST(SpanInfluence, IsTheChangeOfTheLossWhenAKeyIsMasked) {
  const Sample sample(1);
  for (std::int64_t head = 0; head < 2; ++head) {
    const std::vector<double> influence = block_influence(sample.problem, sample.inputs, sample.grad_o, head);
    ASSERT_EQ(influence.size(), 9U);
    std::vector<double> expected(9, 0.0);
    for (std::int64_t i = 0; i < kLength; ++i) {
      const double whole = sample.loss_of_row(head, i, -1);
      for (std::int64_t j = 0; j <= i; ++j) {
        expected[i / 64 * 3 + j / 64] += sample.loss_of_row(head, i, j) - whole;
      }
    }
    for (std::size_t b = 0; b < 9; ++b) EXPECT_NEAR(influence[b], expected[b], 1e-6 * (1 + std::abs(expected[b]))) << b;
    EXPECT_EQ(influence[1], 0);  // above the diagonal
  }
}

TEST(SpanInfluence, AveragesSamplesAndTakesTheGroupsLargest) {
  const std::vector<std::vector<std::vector<double>>> heads{{{1, -4}, {3, 0}}, {{-5, 1}, {1, 1}}};
  EXPECT_EQ(influence_of_group(heads), (std::vector<double>{2, 2}));
}

TEST(SpanInfluence, RefusesOtherProblems) {
  Sample sample(1);
  EXPECT_THROW(block_influence(sample.problem, sample.inputs, sample.grad_o, 2), Error);
  EXPECT_THROW(block_influence(sample.problem, sample.inputs, sample.inputs.q, 0), Error);
  sample.problem.causal = false;
  EXPECT_THROW(block_influence(sample.problem, sample.inputs, sample.grad_o, 0), Error);
}

TEST(SpanRules, StayInsideTheInput) {
  const std::vector<ElasticSpan> rules = candidate_rules(2048, 8192, 16384);
  bool dense = false;
  for (const ElasticSpan& rule : rules) {
    EXPECT_GT(rule.alpha + rule.beta * 2048, 0);
    EXPECT_LE(rule.alpha + rule.beta * 8192, 8192);
    EXPECT_LE(rule.alpha + rule.beta * 16384, 16384);
    dense = dense || rule == ElasticSpan{0, 1};
  }
  EXPECT_TRUE(dense);
  EXPECT_EQ(std::count_if(rules.begin(), rules.end(), [](const ElasticSpan& r) { return r.beta == 0; }), 8);
  EXPECT_GT(std::count_if(rules.begin(), rules.end(), [](const ElasticSpan& r) { return r.alpha < 0; }), 0);
}

TEST(SpanRules, LoseWhatTheyLeaveOut) {
  // 5 blocks; the entry of (i, j) is 10^j in row i.
  std::vector<double> influence(25, 0.0);
  for (std::int64_t i = 0; i < 5; ++i) {
    for (std::int64_t j = 0; j <= i; ++j) influence[i * 5 + j] = std::pow(10, j);
  }
  EXPECT_EQ(loss_of_rule({0, 1}, 320, influence), 0);
  // Three blocks: sinks, and two up to the row's own: rows 3 and 4 lose block 1, row 4 block 2.
  EXPECT_EQ(loss_of_rule({192, 0}, 320, influence), 2 * 10 + 100);
  EXPECT_DOUBLE_EQ(density_of_rule({192, 0}, 320), 0.6);
  EXPECT_DOUBLE_EQ(density_of_rule({0, 1}, 320), 1);
}

SpanProgram random_program(std::uint32_t seed, std::size_t lengths) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<double> uniform;
  SpanProgram program;
  program.layer_of_head = {0, 0, 0, 1, 1, 2};
  program.rules = 4;
  for (std::size_t length = 0; length < lengths; ++length) {
    program.density.push_back({0.2, 0.4 + 0.1 * static_cast<double>(length), 0.6, 1});
    auto& loss = program.loss.emplace_back();
    for (std::size_t head = 0; head < 6; ++head) {
      double falling = 4 * uniform(random);
      for (int rule = 0; rule < 4; ++rule) loss.push_back(falling *= 0.3 + 0.7 * uniform(random));
      loss.back() = 0;
    }
  }
  program.least_share = 0.8;
  return program;
}

/// The best of all assignments; infinity when there is none.
double brute_force(const SpanProgram& program, std::size_t primary, const std::vector<double>& most_loss) {
  double best = std::numeric_limits<double>::infinity();
  for (int code = 0; code < 4096; ++code) {
    std::vector<int> rules;
    for (int head = 0, rest = code; head < 6; ++head, rest /= 4) rules.push_back(rest % 4);
    bool allowed = true;
    for (std::int64_t layer = 0; layer < 3; ++layer) {
      int used = 0;
      for (std::size_t head = 0; head < 6; ++head) {
        if (program.layer_of_head[head] == layer) used |= 1 << rules[head];
      }
      allowed = allowed && __builtin_popcount(static_cast<unsigned>(used)) <= program.rules_per_layer;
    }
    std::vector<double> losses;
    for (std::size_t length = 0; length < program.loss.size(); ++length) {
      double density = 0;
      double loss = 0;
      for (std::size_t head = 0; head < 6; ++head) {
        density += program.density[length][rules[head]] / 6;
        loss += program.loss[length][head * 4 + rules[head]];
      }
      allowed = allowed && density <= program.most_density + 1e-9 &&
                density >= program.least_share * program.most_density - 1e-9;
      if (!most_loss.empty() && length != primary) allowed = allowed && loss <= most_loss[length] + 1e-9;
      losses.push_back(loss);
    }
    if (allowed) best = std::min(best, losses[primary]);
  }
  return best;
}

TEST(SpanSolver, EqualsBruteForce) {
  int infeasible = 0;
  for (std::uint32_t seed = 0; seed < 40; ++seed) {
    SpanProgram program = random_program(seed, 1 + seed % 3);
    program.rules_per_layer = 1 + static_cast<std::int64_t>(seed) % 2;
    program.most_density = 0.4 + 0.1 * (seed % 4);
    for (std::size_t primary = 0; primary < program.loss.size(); ++primary) {
      for (const double limit : {1e9, 4.0, 1.5}) {
        const std::vector<double> limits(program.loss.size(), limit);
        const auto choice = solve(program, primary, limits);
        const double best = brute_force(program, primary, limits);
        if (!std::isfinite(best)) {
          ++infeasible;
          EXPECT_FALSE(choice.has_value()) << "seed " << seed;
          continue;
        }
        ASSERT_TRUE(choice.has_value()) << "seed " << seed;
        EXPECT_TRUE(choice->proven);
        EXPECT_NEAR(choice->loss[primary], best, 1e-9) << "seed " << seed << ", limit " << limit;
      }
    }
  }
  EXPECT_GT(infeasible, 0);
  EXPECT_LT(infeasible, 150);
}

TEST(SpanSolver, WholeDensityIsDense) {
  SpanProgram program = random_program(3, 2);
  program.most_density = 1;
  const auto choice = solve(program, 0);
  ASSERT_TRUE(choice.has_value());
  EXPECT_EQ(choice->rule_of_head, std::vector<std::int64_t>(6, 3));
  EXPECT_EQ(choice->loss, (std::vector<double>{0, 0}));
  const std::vector<ElasticSpan> rules{{128, 0}, {0, 0.25}, {0, 0.5}, {0, 1}};
  const SpanTable table = span_table(program, rules, *choice);
  EXPECT_EQ(table, (SpanTable{{{0, 1}, {0, 1}, {0, 1}}, {{0, 1}, {0, 1}}, {{0, 1}}}));
}

TEST(SpanSolver, FrontIsNotDominatedAndReachesTheEnds) {
  const SpanProgram program = random_program(7, 3);
  const std::vector<SpanChoice> front = pareto_front(program);
  ASSERT_GE(front.size(), 2U);
  for (std::size_t length = 0; length < 3; ++length) {
    double least = std::numeric_limits<double>::infinity();
    for (const SpanChoice& choice : front) least = std::min(least, choice.loss[length]);
    EXPECT_NEAR(least, brute_force(program, length, {}), 1e-9);
  }
  for (const SpanChoice& a : front) {
    for (const SpanChoice& b : front) {
      const bool dominated = &a != &b && b.loss[0] <= a.loss[0] && b.loss[1] <= a.loss[1] && b.loss[2] <= a.loss[2];
      EXPECT_FALSE(dominated);
    }
  }
}

TEST(SpanSolver, PicksByTheUnseenLength) {
  std::vector<SpanChoice> choices(3);
  choices[0].rule_of_head = {0, 0};
  choices[1].rule_of_head = {1, 0};
  choices[2].rule_of_head = {1, 1};
  EXPECT_EQ(best_at(choices, std::vector<double>{3, 1, 2, 5}, 2), 1U);
}

TEST(SpanSolver, HandlesAModel) {
  // 32 layers of 8 kv heads with the rules of the paper's lengths; the losses fall with the span.
  const std::vector<ElasticSpan> rules = candidate_rules(2048, 8192, 16384);
  const std::array<std::int64_t, 3> lengths{2048, 4096, 8192};
  std::mt19937 random(5);
  std::uniform_real_distribution<double> uniform;
  SpanProgram program;
  program.rules = static_cast<std::int64_t>(rules.size());
  for (std::int64_t head = 0; head < 256; ++head) program.layer_of_head.push_back(head / 8);
  std::vector<double> reach;
  reach.reserve(256);
  for (int head = 0; head < 256; ++head) reach.push_back(0.02 + uniform(random) * uniform(random));
  for (const std::int64_t length : lengths) {
    auto& density = program.density.emplace_back();
    for (const ElasticSpan& rule : rules) density.push_back(density_of_rule(rule, length));
    auto& loss = program.loss.emplace_back();
    for (const double head_reach : reach) {
      for (const double share : density) loss.push_back(std::exp(-share / head_reach) - std::exp(-1 / head_reach));
    }
  }
  const auto choice = solve(program, 2, {}, 100000);
  ASSERT_TRUE(choice.has_value());
  double uniform_loss = std::numeric_limits<double>::infinity();
  for (std::int64_t rule = 0; rule < program.rules; ++rule) {
    if (program.density[2][rule] > 0.5) continue;
    double loss = 0;
    for (std::size_t head = 0; head < 256; ++head) loss += program.loss[2][head * rules.size() + rule];
    uniform_loss = std::min(uniform_loss, loss);
  }
  for (const double density : choice->density) {
    EXPECT_LE(density, 0.5 + 1e-9);
    EXPECT_GE(density, 0.45 - 1e-9);
  }
  EXPECT_LT(choice->loss[2], uniform_loss);  // better than one rule for all heads
}

TEST(SpanSolver, RefusesWhatDoesNotFit) {
  SpanProgram program = random_program(1, 2);
  EXPECT_THROW(solve(program, 2), Error);
  EXPECT_THROW(solve(program, 0, std::vector<double>{1}), Error);
  program.loss[1].pop_back();
  EXPECT_THROW(solve(program, 0), Error);
  EXPECT_THROW(candidate_rules(4096, 2048, 8192), Error);
}

}  // namespace
}  // namespace tessera::tune
