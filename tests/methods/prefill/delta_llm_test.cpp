// DeltaLLM: held keys by the text, both ways to score them, and what decoding keeps.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "methods/decode/decoding_step.h"
#include "methods/diffusion/pooled_reference.h"
#include "methods/masks.h"
#include "score/delta_keys.h"

namespace tessera {
namespace {

using test::AttentionCase;
using test::CaseShape;
using test::Result;

struct Settings {
  double theta = 0.6;
  double scale = 0.2;
  std::int64_t sinks = 3;
  std::string local = "aligned";
  std::string rule = "channel";
  std::string scoring = "held";

  std::string spec() const {
    return fmt::format("delta-llm:theta={},scale={},sinks={},local={},rule={},scoring={}", theta, scale, sinks, local,
                       rule, scoring);
  }
  /// Keys as they are held, by the text.
  std::vector<std::vector<double>> held(const AttentionCase& input, std::int64_t s, std::int64_t kv_head) const {
    std::vector<std::vector<double>> all;
    std::vector<double> ref;
    for (std::int64_t n = 0; n < input.problem.kv_len_of(s); ++n) {
      std::vector<double> key;
      for (std::int64_t d = 0; d < input.problem.head_dim; ++d) key.push_back(input.k(s, kv_head, n, d));
      if (n == 0) ref = key;
      std::vector<double> change;
      double square = 0;
      for (std::size_t d = 0; d < key.size(); ++d) {
        change.push_back(std::fabs(key[d] - ref[d]));
        square += change[d] * change[d];
      }
      for (std::size_t d = 0; d < key.size(); ++d) {
        bool moves = rule == "row" ? std::sqrt(square) > theta : change[d] > theta;
        if (rule == "pairs") {
          std::int64_t larger = 0;
          for (std::size_t c = d / 4 * 4; c < std::min(d / 4 * 4 + 4, key.size()); ++c) {
            larger += change[c] > change[d] || (change[c] == change[d] && c < d) ? 1 : 0;
          }
          moves = moves && larger < 2;
        }
        if (moves) ref[d] = key[d];
      }
      all.push_back(ref);
    }
    return all;
  }
  bool exact(const AttentionCase& input, std::int64_t s, std::int64_t p, std::int64_t j) const {
    const std::int64_t keys = input.problem.kv_len_of(s);
    const std::int64_t length = std::max<std::int64_t>(1, std::llround(scale * static_cast<double>(keys)));
    const std::int64_t own = std::min(p, keys - 1);
    if (j < sinks) return true;
    return local == "aligned" ? j >= own / length * length : own - j < length;
  }
};

void expect_formula(const AttentionCase& input, const Settings& settings, double tolerance) {
  const Problem& problem = input.problem;
  const auto method = make_method(settings.spec());
  const Result result = test::attend(*method, input);
  for (std::int64_t s = 0; s < problem.batch; ++s) {
    for (std::int64_t h = 0; h < problem.q_heads; ++h) {
      const auto held = settings.held(input, s, h / problem.group());
      for (std::int64_t n = 0; n < problem.q_len_of(s); ++n) {
        double sum = 0;
        std::vector<double> expected(static_cast<std::size_t>(problem.value_dim), 0.0);
        for (std::int64_t j = 0; j < problem.kv_len_of(s); ++j) {
          if (!input.allowed(s, n, j)) continue;
          const bool exact = settings.exact(input, s, test::position(input, s, n), j);
          double dot = 0;
          for (std::int64_t d = 0; d < problem.head_dim; ++d) {
            dot += input.q(s, h, n, d) * (exact ? input.k(s, h / problem.group(), j, d) : held[j][d]);
          }
          const double weight = std::exp(dot * problem.softmax_scale());
          sum += weight;
          for (std::int64_t d = 0; d < problem.value_dim; ++d) {
            expected[d] += weight * input.v(s, h / problem.group(), j, d);
          }
        }
        const std::int64_t row = test::output_row(problem, s, h, n);
        if (sum == 0) {
          ASSERT_EQ(result.lse[row], -std::numeric_limits<float>::infinity());
          continue;
        }
        ASSERT_NEAR(result.lse[row], std::log(sum), tolerance)
            << settings.spec() << ", sequence " << s << ", head " << h << ", query " << n;
        for (std::int64_t d = 0; d < problem.value_dim; ++d) {
          ASSERT_NEAR(result.o[row * problem.value_dim + d], expected[d] / sum, tolerance);
        }
      }
    }
  }
  EXPECT_EQ(result.o, test::attend(*method, input, KernelKind::automatic, 1).o);
}

TEST(DeltaLlm, FollowsTheTextForEveryKindOfInput) {
  for (const CaseShape& shape : test::all_shapes()) {
    SCOPED_TRACE(shape.name);
    const AttentionCase input(shape);
    if (!input.problem.causal) {
      EXPECT_THROW(make_method("delta-llm")->plan(input.problem, input.inputs, {}), Error);
      continue;
    }
    const double tolerance = shape.dtype == DType::bf16 ? 4e-2 : shape.dtype == DType::f16 ? 6e-3 : 3e-4;
    for (const std::string scoring : {"held", "sparse"}) expect_formula(input, {.scoring = scoring}, tolerance);
  }
}

TEST(DeltaLlm, FollowsTheTextForOtherSettings) {
  const AttentionCase input({.name = "settings", .q_heads = 4, .kv_heads = 2, .q_len = 330, .kv_len = 600});
  for (const std::string scoring : {"held", "sparse"}) {
    for (const Settings& settings :
         {Settings{.theta = 1.5, .scale = 0, .sinks = 0}, Settings{.scale = 0.03, .sinks = 300},
          Settings{.local = "sliding"}, Settings{.theta = 4, .rule = "row"}, Settings{.theta = 0.3, .rule = "pairs"}}) {
      Settings own = settings;
      own.scoring = scoring;
      expect_formula(input, own, 3e-4);
    }
  }
}

TEST(DeltaLlm, ThetaZeroAndScaleOneAreDense) {
  const AttentionCase input({.name = "exact", .q_heads = 4, .kv_heads = 2, .q_len = 300, .kv_len = 300});
  const Result dense = test::attend(*make_method("dense"), input);
  for (const std::string spec :
       {"delta-llm:theta=0,scoring=held", "delta-llm:theta=0,scoring=sparse", "delta-llm:theta=5,scale=1,scoring=held",
        "delta-llm:theta=5,scale=1,scoring=sparse", "delta-llm:theta=5,sinks=1000,scoring=sparse"}) {
    const Result result = test::attend(*make_method(spec), input);
    for (std::size_t i = 0; i < dense.o.size(); ++i) ASSERT_NEAR(result.o[i], dense.o[i], 2e-5) << spec;
  }
  const Result held = test::attend(*make_method("delta-llm:theta=1.5"), input);
  double difference = 0;
  for (std::size_t i = 0; i < dense.o.size(); ++i) difference += std::fabs(held.o[i] - dense.o[i]);
  EXPECT_GT(difference / static_cast<double>(dense.o.size()), 1e-2) << "keys are really held";
}

TEST(DeltaLlm, EveryPairIsPlannedOnce) {
  for (const CaseShape& shape : test::all_shapes()) {
    SCOPED_TRACE(shape.name);
    const AttentionCase input(shape);
    if (!input.problem.causal) continue;
    for (const std::string spec : {"delta-llm", "delta-llm:scale=0.1,sinks=7", "delta-llm:scale=0.3,local=sliding"}) {
      const auto method = make_method(spec);
      test::expect_plans_hold(*method, input);
      EXPECT_EQ(statistics(method->plan(input.problem, input.inputs, {})).planned_pairs,
                statistics(dense_plan(input.problem)).planned_pairs);
    }
  }
}

TEST(DeltaKeys, StrayByThetaAtMostAndScoreAsTheirSums) {
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  for (const std::int64_t dim : {3, 64, 100}) {
    const std::int64_t count = 700;
    std::vector<float> rows(static_cast<std::size_t>(count * dim));
    for (std::int64_t i = 0; i < count * dim; ++i) {
      rows[i] = (i < dim ? 0 : 0.8F * rows[i - dim]) + normal(random);
    }
    score::DeltaKeys keys(dim, score::DeltaRule::channel, 0.7F);
    keys.append(rows.data(), 300);
    keys.append(rows.data() + 300 * dim, count - 300);
    std::vector<float> held(rows.size());
    keys.expand(0, count, held.data());
    for (std::size_t i = 0; i < rows.size(); ++i) ASSERT_LE(std::fabs(held[i] - rows[i]), 0.7F);
    EXPECT_LT(keys.moved(), count * dim * 3 / 4);
    std::vector<float> part(static_cast<std::size_t>(20 * dim));
    keys.expand(250, 20, part.data());
    EXPECT_TRUE(std::equal(part.begin(), part.end(), held.begin() + 250 * dim));
    for (const std::int64_t width : {16, 64}) {
      std::vector<float> queries(static_cast<std::size_t>(dim * width));
      for (float& x : queries) x = normal(random);
      for (const Isa isa : supported_isas()) {
        for (std::int64_t panel = 0; panel < 3; ++panel) {
          std::vector<float> before;
          std::vector<float> scores(static_cast<std::size_t>(score::kDeltaPanel * width));
          const std::int64_t n = keys.panel_scores(panel, queries.data(), width, isa, before, scores.data());
          EXPECT_EQ(n, panel < 2 ? 256 : 700 - 512);
          for (std::int64_t j = 0; j < n; ++j) {
            for (std::int64_t r = 0; r < width; r += 7) {
              double dot = 0;
              double bound = 0;
              double exact = 0;
              for (std::int64_t d = 0; d < dim; ++d) {
                const double q = queries[d * width + r];
                dot += q * held[(panel * 256 + j) * dim + d];
                exact += q * rows[(panel * 256 + j) * dim + d];
                bound += 0.7 * std::fabs(q);
              }
              ASSERT_NEAR(scores[j * width + r], dot, 2e-4) << name_of(isa);
              ASSERT_LE(std::fabs(dot - exact), bound);
            }
          }
        }
      }
    }
  }
}

TEST(DeltaKeys, ConstantKeysMoveOnce) {
  for (const score::DeltaRule rule : {score::DeltaRule::channel, score::DeltaRule::row, score::DeltaRule::pairs}) {
    std::vector<float> rows(500 * 8, 1.5F);
    score::DeltaKeys keys(8, rule, 0);
    keys.append(rows.data(), 500);
    EXPECT_EQ(keys.moved(), 8);
  }
  score::DeltaKeys pairs(8, score::DeltaRule::pairs, 0);
  std::vector<float> rows{0, 0, 0, 0, 0, 0, 0, 0, 3, 2, 1, 4, 1, 1, 1, 1};
  pairs.append(rows.data(), 2);
  std::vector<float> held(8);
  pairs.expand(1, 1, held.data());
  EXPECT_EQ(held, (std::vector<float>{3, 0, 0, 4, 1, 1, 0, 0}));
}

TEST(DeltaKeys, TruncationForgetsAndAppendGoesOn) {
  std::mt19937 random(4);
  std::normal_distribution<float> normal;
  std::vector<float> rows(900 * 5);
  for (float& x : rows) x = normal(random);
  score::DeltaKeys keys(5, score::DeltaRule::channel, 0.5F);
  keys.append(rows.data(), 900);
  std::vector<float> whole(rows.size());
  keys.expand(0, 900, whole.data());
  for (const std::int64_t to : {899, 512, 300, 0}) {
    const std::int64_t left = keys.truncate(to);
    EXPECT_LE(left, to);
    EXPECT_GT(left, to - score::kDeltaPanel);
    keys.append(rows.data() + left * 5, 900 - left);
    std::vector<float> again(rows.size());
    keys.expand(0, 900, again.data());
    EXPECT_EQ(again, whole);
  }
}

TEST(DeltaLlm, DecodingExtendsTheChanges) {
  // Token by token over one state gives what each step gives alone; a key that a failed pass left is replaced.
  const std::int64_t total = 300;
  const AttentionCase all({.name = "decode", .q_heads = 4, .kv_heads = 2, .q_len = total, .kv_len = total});
  const auto method = make_method("delta-llm:theta=0.9,scale=0.1");
  const auto state = method->new_state();
  for (const std::int64_t keys : {250, 251, 252, 252, 270, 299}) {
    AttentionCase step({.name = "step", .q_heads = 4, .kv_heads = 2, .q_len = 1, .kv_len = keys});
    for (std::int64_t h = 0; h < 4; ++h) {
      for (std::int64_t d = 0; d < 16; ++d) {
        step.set_q(0, h, 0, d, all.q(0, h, keys - 1, d));
        for (std::int64_t j = 0; j < keys && h < 2; ++j) step.set_k(0, h, j, d, all.k(0, h, j, d));
      }
    }
    const auto with = test::attend_layer(*method, step, 3, state.get());
    const auto without = test::attend_layer(*method, step, 3, nullptr);
    for (std::size_t i = 0; i < with.o.size(); ++i) ASSERT_NEAR(with.o[i], without.o[i], 1e-5) << keys;
    expect_formula(step, {.theta = 0.9, .scale = 0.1, .sinks = 0, .scoring = "auto"}, 3e-4);
  }
  EXPECT_GT(state->memory_bytes(), 0U);
}

TEST(DeltaLlm, OddInputsStayCorrect) {
  for (const std::string scoring : {"held", "sparse"}) {
    for (const float size : {0.0F, 3e4F}) {
      AttentionCase input({.name = "odd", .q_heads = 2, .q_len = 300, .kv_len = 300});
      for (std::int64_t n = 0; n < 300; ++n) {
        for (std::int64_t d = 0; d < 16; ++d) input.set_k(0, 0, n, d, n == 40 ? size : 0.25F);
      }
      const Result result = test::attend(*make_method("delta-llm:scale=0.1,scoring=" + scoring), input);
      for (const float x : result.o) ASSERT_TRUE(std::isfinite(x));
    }
    // An undefined key reaches the queries that see it and no other.
    AttentionCase input({.name = "nan", .q_heads = 2, .q_len = 300, .kv_len = 300});
    input.set_k(0, 0, 200, 3, std::nanf(""));
    const Result result = test::attend(*make_method("delta-llm:scale=0.1,scoring=" + scoring), input);
    for (std::int64_t n = 0; n < 300; ++n) ASSERT_EQ(std::isnan(result.o[n * 8]), n >= 200) << scoring << " " << n;
  }
}

TEST(DeltaLlm, RefusesWhatItCannotSay) {
  AttentionCase input({.name = "alibi", .q_len = 100, .kv_len = 100});
  const std::vector<float> slopes{0.1F, 0.2F};
  input.inputs.modifiers.alibi_slopes = slopes;
  EXPECT_THROW(test::attend(*make_method("delta-llm"), input), Error);
  AttentionCase capped({.name = "softcap", .q_len = 100, .kv_len = 100});
  capped.inputs.modifiers.softcap = 5;
  EXPECT_THROW(test::attend(*make_method("delta-llm:scoring=sparse"), capped), Error);
  EXPECT_NO_THROW(test::attend(*make_method("delta-llm:scoring=held"), capped));
  EXPECT_THROW(make_method("delta-llm:scale=2"), Error);
}

}  // namespace
}  // namespace tessera
