// Rows that are no softmax, and scales per query: every kernel against the reference, and the reference against the
// formula.
#include <gtest/gtest.h>

#include "kernels/kernel_case.h"

namespace tessera {
namespace {

using testing::CaseOptions;
using testing::KernelCase;
using testing::Random;
using testing::RandomPlan;
using testing::RandomPlanOptions;
using testing::tested_levels;
using testing::TestedLevel;

/// Modifiers under test and what they point to.
struct RowRule {
  std::vector<float> query_scale;
  std::vector<float> factors;

  void apply(Random& random, RowWeights weights, KernelCase& c) {
    const Problem& p = c.plan.problem;
    std::uniform_real_distribution<float> uniform(0.2F, 1.0F);
    query_scale.resize(static_cast<std::size_t>(p.q_len));
    for (float& x : query_scale) x = uniform(random) * (uniform(random) < 0.4F ? -1.0F : 1.0F);
    factors.resize(static_cast<std::size_t>((p.variable_length() ? 1 : p.batch) * p.q_heads * p.q_len));
    for (float& x : factors) x = uniform(random);
    Modifiers& m = c.inputs.modifiers;
    m.query_scale = query_scale;
    m.weights = weights;
    if (weights == RowWeights::reweighted) {
      m.weight_factors = factors;
      m.weight_offset = 0.3F;
      m.weight_power = 3;
    }
  }
};

void expect_kernels_agree(const KernelCase& c, const CaseOptions& options, RowWeights weights,
                          const std::string& what) {
  const auto expected = c.reference();
  const auto value_dim = static_cast<std::size_t>(c.plan.problem.value_dim);
  for (const TestedLevel& level : tested_levels()) {
    std::vector<KernelKind> kinds{KernelKind::query_major, KernelKind::split_key};
    if (kernels::can_run_key_major(c.plan)) kinds.push_back(KernelKind::key_major);
    for (const KernelKind kind : kinds) {
      const bool pairs = level.kernels->pairs_bf16 && options.dtype == DType::bf16 && kind != KernelKind::split_key;
      const auto actual = c.with(kind, *level.kernels);
      EXPECT_TRUE(actual.guards_intact);
      // A third power has thrice the relative error of its base, and more where the offset takes most of it away.
      const float bound = c.tolerance(pairs) * (weights == RowWeights::reweighted ? 8.0F : 2.0F);
      for (std::size_t row = 0; row < expected.lse.size(); ++row) {
        if (std::isinf(expected.lse[row])) {
          EXPECT_EQ(actual.lse[row], expected.lse[row]) << what << " row " << row;
        } else if (expected.lse[row] < -3) {
          continue;  // hardly any weight: what is left of it after the offset is rounding
        } else {
          ASSERT_NEAR(actual.lse[row], expected.lse[row], 20 * c.lse_tolerance()) << what << " " << level.name;
        }
        for (std::size_t i = row * value_dim; i < (row + 1) * value_dim; ++i) {
          ASSERT_NEAR(actual.o[i], expected.o[i], bound)
              << what << " " << level.name << " " << name_of(kind) << " element " << i;
        }
      }
    }
  }
}

class RowWeightsTest : public ::testing::TestWithParam<RowWeights> {};

TEST_P(RowWeightsTest, EveryKernelMatchesTheReference) {
  for (int seed = 0; seed < 16; ++seed) {
    Random random(static_cast<std::uint64_t>(seed));
    const Problem problem = testing::random_problem(random);
    CaseOptions options = testing::random_options(random);
    options.output = DType::f32;
    RandomPlanOptions plan_options;
    plan_options.query_orders = seed % 4 == 1;
    plan_options.key_orders = seed % 4 == 2;
    KernelCase c(random, RandomPlan(random, problem, plan_options).make(), options);
    RowRule rule;
    rule.apply(random, GetParam(), c);
    expect_kernels_agree(c, options, GetParam(), "seed " + std::to_string(seed));
    if (HasFatalFailure()) return;
  }
}
INSTANTIATE_TEST_SUITE_P(Weights, RowWeightsTest,
                         ::testing::Values(RowWeights::softmax, RowWeights::softplus, RowWeights::reweighted),
                         [](const auto& weights) { return std::string(name_of(weights.param)); });

TEST(RowWeights, SoftplusIsTheFormula) {
  Problem problem;
  problem.q_heads = 2;
  problem.q_len = 3;
  problem.kv_len = 5;
  problem.causal = true;
  CaseOptions options;
  options.head_dim = options.value_dim = 8;
  Random random(5);
  KernelCase c(random, dense_plan([&] {
                 Problem p = problem;
                 p.head_dim = p.value_dim = 8;
                 return p;
               }()),
               options);
  c.inputs.modifiers.weights = RowWeights::softplus;
  const auto result = c.reference();
  for (std::int64_t h = 0; h < 2; ++h) {
    for (std::int64_t n = 0; n < 3; ++n) {
      double sum = 0;
      std::vector<double> o(8, 0.0);
      for (std::int64_t j = 0; j <= n + 2; ++j) {
        double dot = 0;
        for (std::int64_t d = 0; d < 8; ++d) {
          dot += static_cast<double>(load_as_float(c.q.view.row(0, h, n), DType::f32, d)) *
                 load_as_float(c.k.view.row(0, 0, j), DType::f32, d);
        }
        const double weight = std::log(1 + std::exp(dot / std::sqrt(8.0)));
        sum += weight;
        for (std::int64_t d = 0; d < 8; ++d) {
          o[static_cast<std::size_t>(d)] += weight * load_as_float(c.v.view.row(0, 0, j), DType::f32, d);
        }
      }
      const auto row = static_cast<std::size_t>(h * 3 + n);
      EXPECT_NEAR(result.lse[row], std::log(sum), 1e-5);
      for (std::size_t d = 0; d < 8; ++d) EXPECT_NEAR(result.o[row * 8 + d], o[d] / sum, 1e-5);
    }
  }
}

TEST(RowWeights, BadModifiersAreRefused) {
  Problem problem;
  problem.q_len = 4;
  problem.kv_len = 8;
  problem.head_dim = problem.value_dim = 64;
  Random random(1);
  KernelCase c(random, dense_plan(problem), {});
  const std::vector<float> rows(4, 1.0F);
  const std::vector<float> sinks(1, 0.0F);
  const auto refused = [&](const Modifiers& m) {
    AttentionInputs inputs = c.inputs;
    inputs.modifiers = m;
    EXPECT_THROW(check_inputs(c.plan.problem, inputs), Error);
  };
  const std::span<const float> three(rows.data(), 3);
  Modifiers m;
  m.query_scale = three;
  refused(m);
  m = {};
  m.weights = RowWeights::softplus;
  m.sink_logits = sinks;
  refused(m);
  m = {};
  m.weights = RowWeights::reweighted;
  refused(m);
  m.weight_factors = rows;
  m.weight_power = 0;
  refused(m);
  m.weight_power = 65;
  refused(m);
  m.weight_power = 1;
  m.weight_offset = -1;
  refused(m);
  m.weight_offset = std::numeric_limits<float>::infinity();
  refused(m);
}

}  // namespace
}  // namespace tessera
