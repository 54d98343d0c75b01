// What attend() writes, against the float64 softmax over the pairs of its plan.
#pragma once

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "methods/masks.h"

namespace tessera::test {

struct Attended {
  std::vector<float> o;
  std::vector<float> lse;
  Plan plan;
  RunReport report;
};

inline Attended attend(const Method& method, const AttentionCase& input, int threads = 2) {
  const Problem& problem = input.problem;
  const std::int64_t batch = problem.variable_length() ? 1 : problem.batch;
  Attended out;
  out.o.assign(static_cast<std::size_t>(batch * problem.q_heads * problem.q_len * problem.value_dim), 777.0F);
  out.lse.assign(static_cast<std::size_t>(batch * problem.q_heads * problem.q_len), 777.0F);
  const AttentionOutputs outputs{
      mutable_view_of(out.o.data(), DType::f32, {batch, problem.q_heads, problem.q_len, problem.value_dim}), out.lse};
  PlanContext context;
  context.run.threads = threads;
  out.report = method.attend(problem, input.inputs, outputs, context, &out.plan);
  return out;
}

/// attend() reports the plan of plan(), and gives the attention over its pairs: none left out, none counted twice.
inline void expect_attends_its_plan(const std::string& spec, const AttentionCase& input, double tolerance = 2e-4) {
  SCOPED_TRACE(spec);
  const auto method = make_method(spec);
  const Attended out = attend(*method, input);
  const Problem& problem = input.problem;
  EXPECT_TRUE(out.plan == method->plan(problem, input.inputs, {}));
  const auto mask = dense_mask(out.plan);
  for (std::int64_t s = 0; s < problem.batch; ++s) {
    for (std::int64_t h = 0; h < problem.q_heads; ++h) {
      const HeadMask head = head_mask(out.plan, mask, s, h);
      for (std::int64_t n = 0; n < head.queries; ++n) {
        const auto p = input.probabilities(s, h, n);
        std::vector<double> expected(static_cast<std::size_t>(problem.value_dim), 0.0);
        double sum = 0;
        for (std::int64_t j = 0; j < head.keys; ++j) {
          if (!head.at(n, j)) continue;
          sum += p[j];
          for (std::size_t d = 0; d < expected.size(); ++d) {
            expected[d] += p[j] * input.v(s, h / problem.group(), j, static_cast<std::int64_t>(d));
          }
        }
        const std::int64_t row =
            (problem.tensor_batch_of(s) * problem.q_heads + h) * problem.q_len + problem.q_begin_of(s) + n;
        for (std::size_t d = 0; d < expected.size(); ++d) {
          const float actual = out.o[static_cast<std::size_t>(row * problem.value_dim) + d];
          ASSERT_NEAR(actual, sum > 0 ? expected[d] / sum : 0.0, tolerance) << s << " " << h << " " << n << " " << d;
        }
        if (sum == 0) {
          ASSERT_EQ(out.lse[row], -std::numeric_limits<float>::infinity()) << row;
        }
      }
    }
  }
}

/// Inputs that break what methods hope for; whatever they choose, finite inputs give finite outputs.
inline void expect_finite_on_bad_data(const std::string& spec, std::int64_t length) {
  for (const std::string kind : {"equal keys", "zero queries", "one loud key", "huge logits", "two clusters"}) {
    SCOPED_TRACE(fmt::format("{}, {}", spec, kind));
    AttentionCase input({.name = kind, .q_len = length, .kv_len = length});
    for (std::int64_t n = 0; n < length; ++n) {
      for (std::int64_t d = 0; d < 16; ++d) {
        if (kind == "equal keys") input.set_k(0, 0, n, d, 1);
        if (kind == "huge logits") input.set_k(0, 0, n, d, input.k(0, 0, n, d) * 300);
        if (kind == "two clusters") input.set_k(0, 0, n, d, n % 2 == 0 ? 1.0F : -1.0F);
        for (std::int64_t h = 0; h < 2; ++h) {
          if (kind == "zero queries") input.set_q(0, h, n, d, 0);
          if (kind == "huge logits") input.set_q(0, h, n, d, input.q(0, h, n, d) * 300);
        }
      }
    }
    if (kind == "one loud key") {
      for (std::int64_t d = 0; d < 16; ++d) input.set_k(0, 0, 3, d, 1e4F);
    }
    const Attended out = attend(*make_method(spec), input);
    for (const float x : out.o) ASSERT_TRUE(std::isfinite(x));
    for (const float x : out.lse) ASSERT_TRUE(std::isfinite(x));
  }
}

}  // namespace tessera::test
