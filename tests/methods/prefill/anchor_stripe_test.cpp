// AnchorAttention: regions, the choice of stripes, and the two phases as one softmax.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>

#include "methods/attended.h"

namespace tessera {
namespace {

using test::AttentionCase;
using test::CaseShape;
using test::HeadMask;
using test::masks_of;

struct Sizes {
  std::int64_t block = 16;
  std::int64_t step = 2;
  double theta = 12;
  std::int64_t init = 1;
  std::int64_t local = 1;
  std::string spec() const {
    return fmt::format("anchor-stripe:block={},step={},theta={},init={},local={}", block, step, theta, init, local);
  }
};

double score(const AttentionCase& input, std::int64_t s, std::int64_t h, std::int64_t n, std::int64_t j) {
  double dot = 0;
  for (std::int64_t d = 0; d < input.problem.head_dim; ++d) {
    dot += static_cast<double>(input.q(s, h, n, d)) * input.k(s, h / input.problem.group(), j, d);
  }
  return dot * input.problem.softmax_scale();
}

/// The text once more, in float64 and with plain loops.
std::vector<HeadMask> expected_masks(const AttentionCase& input, const Sizes& sizes) {
  const Problem& problem = input.problem;
  const std::int64_t super_rows = sizes.block * sizes.step;
  const auto local_begin = [&](std::int64_t s, std::int64_t n) {
    const std::int64_t first = test::position(input, s, n / super_rows * super_rows);
    return std::clamp<std::int64_t>(first - (sizes.local - 1) * super_rows, 0, problem.kv_len_of(s));
  };
  const auto anchored = [&](std::int64_t s, std::int64_t n, std::int64_t j) {
    const bool tail = n / super_rows >= problem.q_len_of(s) / super_rows;
    return input.allowed(s, n, j) && (tail || j < sizes.init * sizes.block || j >= local_begin(s, n));
  };
  std::vector<std::vector<std::uint8_t>> stripes;  // per (sequence, head): [super-tile][key]
  for (std::int64_t s = 0; s < problem.batch; ++s) {
    const std::int64_t keys = problem.kv_len_of(s);
    for (std::int64_t h = 0; h < problem.q_heads; ++h) {
      std::vector<std::uint8_t>& own = stripes.emplace_back();
      for (std::int64_t u = 0; u < problem.q_len_of(s) / super_rows; ++u) {
        own.resize(static_cast<std::size_t>((u + 1) * keys), 0);
        for (std::int64_t first = u * super_rows; first < (u + 1) * super_rows; first += sizes.block) {
          double mean_maximum = 0;
          std::vector<double> mean_score(static_cast<std::size_t>(keys), 0.0);
          for (std::int64_t n = first; n < first + sizes.block; ++n) {
            double most = -INFINITY;
            for (std::int64_t j = 0; j < keys; ++j) {
              const double x = score(input, s, h, n, j);
              if (anchored(s, n, j)) most = std::max(most, x);
              mean_score[j] += x / static_cast<double>(sizes.block);
            }
            mean_maximum += most / static_cast<double>(sizes.block);
          }
          for (std::int64_t j = sizes.init * sizes.block; j < local_begin(s, first); ++j) {
            if (mean_score[j] + sizes.theta >= mean_maximum) own[u * keys + j] = 1;
          }
        }
      }
    }
  }
  return test::masks_where(input, [&](std::int64_t s, std::int64_t h, std::int64_t n, std::int64_t j) {
    if (anchored(s, n, j)) return true;
    const auto place = static_cast<std::size_t>(n / super_rows * problem.kv_len_of(s) + j);
    const std::vector<std::uint8_t>& own = stripes[s * problem.q_heads + h];
    return input.allowed(s, n, j) && place < own.size() && own[place] != 0;
  });
}

TEST(AnchorStripe, FollowsTheTextWithPlainLoops) {
  std::int64_t some = 0;
  for (const CaseShape& shape : {CaseShape{.name = "square", .q_heads = 4, .kv_heads = 2, .q_len = 208, .kv_len = 208},
                                 CaseShape{.name = "whole", .q_len = 192, .kv_len = 192},
                                 CaseShape{.name = "chunk", .batch = 2, .q_len = 96, .kv_len = 250},
                                 CaseShape{.name = "lengths", .q_lens = {130, 0, 64}, .kv_lens = {260, 10, 64}}}) {
    const AttentionCase input(shape);
    for (const Sizes& sizes : {Sizes{.theta = 2}, Sizes{.theta = 4, .init = 2}, Sizes{.theta = 3, .local = 2},
                               Sizes{.block = 32, .step = 1, .theta = 2.5}, Sizes{.step = 3, .theta = 1}}) {
      SCOPED_TRACE(shape.name + " " + sizes.spec());
      const auto expected = expected_masks(input, sizes);
      EXPECT_TRUE(masks_of(sizes.spec(), input) == expected);
      Sizes none = sizes;
      none.theta = -1e30;
      some += expected == expected_masks(input, none) || expected == test::dense_masks(input) ? 0 : 1;
    }
  }
  EXPECT_GT(some, 10);  // cases where some stripes are chosen and some are not
}

TEST(AnchorStripe, ThetaGoesFromTheAnchorAloneToDense) {
  const AttentionCase input({.name = "theta", .q_len = 320, .kv_len = 320});
  EXPECT_TRUE(masks_of("anchor-stripe:block=16,step=4,theta=1e30", input) == test::dense_masks(input));
  const auto anchor = test::masks_where(input, [](std::int64_t, std::int64_t, std::int64_t n, std::int64_t j) {
    return j <= n && (j < 16 || j >= n / 64 * 64);
  });
  EXPECT_TRUE(masks_of("anchor-stripe:block=16,step=4,theta=-1e30", input) == anchor);
}

TEST(AnchorStripe, AKeyThatOneTileLikesServesItsSuperTile) {
  AttentionCase input({.name = "planted", .q_heads = 1, .q_len = 320, .kv_len = 320});
  for (std::int64_t n = 0; n < 320; ++n) {
    for (std::int64_t d = 0; d < 16; ++d) input.set_q(0, 0, n, d, d == 1 || (d == 0 && n / 16 == 13) ? 3.0F : 0.0F);
    input.set_k(0, 0, n, 0, 0);
  }
  input.set_k(0, 0, 100, 0, 30);
  const auto mask = masks_of("anchor-stripe:block=16,step=4,theta=0", input)[0];
  for (std::int64_t n = 128; n < 320; ++n) EXPECT_EQ(mask.at(n, 100), n / 64 == 3) << n;
}

TEST(AnchorStripe, BothPhasesAreOneSoftmax) {
  for (const CaseShape& shape : test::all_shapes()) {
    if (!shape.causal) continue;
    const AttentionCase input(shape);
    SCOPED_TRACE(shape.name);
    test::expect_attends_its_plan("anchor-stripe:block=16,step=2,theta=2", input,
                                  shape.dtype == DType::f32 || shape.dtype == DType::f16 ? 2e-4 : 2e-2);
  }
}

TEST(AnchorStripe, ModifiersApplyToTheJointPlan) {
  AttentionCase input({.name = "modifiers", .q_len = 200, .kv_len = 200});
  const auto method = make_method("anchor-stripe:block=16,step=2,theta=2");
  const std::vector<float> sinks{0.5F, 3.0F};
  const Plan plan = method->plan(input.problem, input.inputs, {});
  for (const bool cap : {false, true}) {
    if (cap) input.inputs.modifiers.softcap = 2;
    input.inputs.modifiers.sink_logits = sinks;
    const test::Attended out = test::attend(*method, input);
    EXPECT_TRUE(out.plan == plan);
    std::vector<float> o(out.o.size());
    std::vector<float> lse(out.lse.size());
    RunOptions reference;
    reference.kernel = KernelKind::reference;
    run(plan, input.inputs, {mutable_view_of(o.data(), DType::f32, {1, 2, 200, 8}), lse}, reference);
    for (std::size_t i = 0; i < o.size(); ++i) ASSERT_NEAR(o[i], out.o[i], 2e-4);
    for (std::size_t i = 0; i < lse.size(); ++i) ASSERT_NEAR(lse[i], out.lse[i], 2e-4);
  }
}

TEST(AnchorStripe, FullBudgetAndEveryShape) {
  for (const CaseShape& shape : test::all_shapes()) {
    if (!shape.causal) continue;
    const AttentionCase input(shape);
    SCOPED_TRACE(shape.name);
    test::expect_full_budget_is_dense(*make_method("anchor-stripe"), input);  // below one super-tile
    test::expect_full_budget_is_dense(*make_method("anchor-stripe:block=16,step=1,theta=1e30"), input);
    test::expect_plans_hold(*make_method("anchor-stripe:block=16,step=2,theta=1"), input);
    test::expect_plans_hold(*make_method("anchor-stripe:block=16,step=1,theta=-1e30,local=3"), input);
  }
}

TEST(AnchorStripe, UndefinedScoresAreKeptAndBadDataStaysFinite) {
  AttentionCase input({.name = "nan", .q_len = 256, .kv_len = 256});
  input.set_k(0, 0, 40, 0, std::nanf(""));
  for (const auto& mask : masks_of("anchor-stripe:block=16,step=2,theta=-1e30", input)) {
    for (std::int64_t n = 64; n < 256; ++n) ASSERT_TRUE(mask.at(n, 40));
    EXPECT_FALSE(mask.at(255, 41));
  }
  test::expect_finite_on_bad_data("anchor-stripe:block=16,step=2", 200);
  test::expect_finite_on_bad_data("anchor-stripe:block=16,step=2,theta=0", 5);
}

TEST(AnchorStripe, BidirectionalIsRefused) {
  const AttentionCase input({.name = "both", .q_len = 40, .kv_len = 40, .causal = false});
  EXPECT_THROW(make_method("anchor-stripe")->plan(input.problem, input.inputs, {}), Error);
}

}  // namespace
}  // namespace tessera
