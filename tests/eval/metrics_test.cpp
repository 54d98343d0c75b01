#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "eval/sampled.h"
#include "tessera/eval.h"

namespace tessera {
namespace {

constexpr float kNothing = -std::numeric_limits<float>::infinity();

OutputError compare(const std::vector<float>& o, const std::vector<float>& reference, std::int64_t heads,
                    std::int64_t rows, std::int64_t dim, const std::vector<float>& lse = {},
                    const std::vector<float>& reference_lse = {}) {
  return compare_outputs(view_of(o.data(), DType::f32, {1, heads, rows, dim}), lse,
                         view_of(reference.data(), DType::f32, {1, heads, rows, dim}), reference_lse);
}

TEST(OutputError, EqualOutputsHaveNone) {
  const std::vector<float> o = {1, 2, 3, 4};
  const OutputError error = compare(o, o, 1, 2, 2);
  EXPECT_EQ(error.rel_l1, 0);
  EXPECT_EQ(error.rel_l2, 0);
  EXPECT_EQ(error.max_abs, 0);
  EXPECT_NEAR(error.cosine, 1, 1e-12);
  EXPECT_TRUE(std::isinf(error.psnr));
}

TEST(OutputError, ByHand) {
  // Differences 1, 0 | 0, -2.
  const OutputError error = compare({2, 2, 3, 2}, {1, 2, 3, 4}, 2, 1, 2);
  EXPECT_NEAR(error.rel_l1, 3.0 / 10, 1e-12);
  EXPECT_NEAR(error.rel_l2, std::sqrt(5.0 / 30), 1e-12);
  EXPECT_NEAR(error.nmse, 5.0 / 30, 1e-12);
  EXPECT_NEAR(error.rmse, std::sqrt(5.0 / 4), 1e-12);
  EXPECT_NEAR(error.cosine, 23 / std::sqrt(21.0 * 30), 1e-12);
  EXPECT_NEAR(error.max_abs, 2, 1e-12);
  EXPECT_NEAR(error.max_rel, 0.5, 1e-12);
  EXPECT_NEAR(error.psnr, 10 * std::log10(9 / 1.25), 1e-12);
  EXPECT_NEAR(error.head_rel_l1[0], 1.0 / 3, 1e-12);
  EXPECT_NEAR(error.head_rel_l1[1], 2.0 / 7, 1e-12);
}

TEST(OutputError, MassFollowsFromTheLses) {
  const std::vector<float> o = {1, 1, 1, 1};
  const float half = std::log(0.5F);
  const OutputError error = compare(o, o, 1, 4, 1, {half, 0, kNothing, kNothing}, {0, 0, 0, kNothing});
  EXPECT_NEAR(error.softmax_mass, (0.5 + 1 + 0 + 1) / 4, 1e-6);
  EXPECT_EQ(error.softmax_mass_min, 0);
}

TEST(OutputError, ValueGapIsTheDistanceOfTheDroppedMean) {
  // Keys with weights 3/4 (kept, value 1) and 1/4 (dropped, value 5): O = 2, O~ = 1, D = 5.
  const OutputError error = compare({1}, {2}, 1, 1, 1, {std::log(3.0F)}, {std::log(4.0F)});
  EXPECT_NEAR(error.softmax_mass, 0.75, 1e-6);
  EXPECT_NEAR(error.value_gap_mean, (5.0 - 1.0) / 2.0, 1e-5);
}

TEST(OutputError, NanIsNotHidden) {
  const OutputError error = compare({1, std::nanf(""), 3}, {1, 2, 3}, 1, 1, 3);
  EXPECT_TRUE(std::isnan(error.rel_l2));
  EXPECT_TRUE(std::isnan(error.max_abs));
}

TEST(OutputError, ShapesMustAgree) {
  const std::vector<float> o = {1, 2, 3, 4};
  EXPECT_THROW(
      compare_outputs(view_of(o.data(), DType::f32, {1, 1, 2, 2}), {}, view_of(o.data(), DType::f32, {1, 1, 4, 1}), {}),
      Error);
  EXPECT_THROW(compare(o, o, 1, 2, 2, {0}, {0}), Error);
}

TEST(SampledReference, EqualsTheReferenceKernel) {
  HeadOptions options;
  options.kind = "mixed";
  options.batch = 2;
  options.tokens = 150;
  options.q_tokens = 40;
  options.q_heads = 4;
  options.kv_heads = 2;
  options.head_dim = 32;
  options.value_dim = 24;
  const HeadData data = make_heads(options);
  const std::vector<float> slopes = {0.1F, 0.2F, 0.05F, 0};
  const std::vector<float> sinks = {1, -2, 0.5F, 3};
  AttentionInputs inputs;
  inputs.q = data.q();
  inputs.k = data.k();
  inputs.v = data.v();
  inputs.modifiers = {.softcap = 20, .alibi_slopes = slopes, .sink_logits = sinks, .key_bias = {}};
  std::vector<float> o(2 * 4 * 40 * 24);
  std::vector<float> lse(2 * 4 * 40);
  run(dense_plan(data.problem), inputs, {mutable_view_of(o.data(), DType::f32, {2, 4, 40, 24}), std::span<float>(lse)},
      {.kernel = KernelKind::reference, .isa = {}});
  const std::vector<std::int64_t> rows = {0, 17, 39};
  const eval::SampledRows sampled = eval::sampled_reference(data.problem, inputs, rows);
  const std::vector<float> chosen = sampled.rows_of(view_of(o.data(), DType::f32, {2, 4, 40, 24}));
  const std::vector<float> chosen_lse = sampled.rows_of(lse, 40);
  for (std::size_t i = 0; i < chosen.size(); ++i) EXPECT_NEAR(chosen[i], sampled.o[i], 1e-5);
  for (std::size_t i = 0; i < chosen_lse.size(); ++i) EXPECT_NEAR(chosen_lse[i], sampled.lse[i], 1e-5);
  EXPECT_THROW(eval::sampled_reference(data.problem, inputs, std::vector<std::int64_t>{40}), Error);
}

TEST(SampledReference, SpreadRowsEndWithTheLast) {
  EXPECT_EQ(eval::spread_rows(100, 4), (std::vector<std::int64_t>{24, 49, 74, 99}));
  EXPECT_EQ(eval::spread_rows(3, 8), (std::vector<std::int64_t>{0, 1, 2}));
}

}  // namespace
}  // namespace tessera
