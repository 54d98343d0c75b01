// gated: the gate, its shapes, and what lies inside.
#include <gtest/gtest.h>

#include <cmath>

#include "methods/masks.h"

namespace tessera {
namespace {

using test::AttentionCase;

struct Gate {
  std::vector<float> logits;
  std::int64_t dim;

  Gate(const AttentionCase& c, std::int64_t width, float constant = 0) : dim(width) {
    const Problem& p = c.problem;
    const std::int64_t batch = p.variable_length() ? 1 : p.batch;
    logits.assign(static_cast<std::size_t>(batch * p.q_heads * p.q_len * dim), constant);
    if (constant != 0) return;
    for (std::size_t i = 0; i < logits.size(); ++i) logits[i] = std::sin(static_cast<float>(i) * 0.7F) * 3;
  }
  SideTensor side(const AttentionCase& c) const {
    const Problem& p = c.problem;
    return {"gate", view_of(logits.data(), DType::f32, {p.variable_length() ? 1 : p.batch, p.q_heads, p.q_len, dim})};
  }
};

std::vector<float> output_of(const std::string& spec, const AttentionCase& c, const std::vector<SideTensor>& side) {
  const Problem& p = c.problem;
  const std::int64_t batch = p.variable_length() ? 1 : p.batch;
  std::vector<float> o(static_cast<std::size_t>(batch * p.q_heads * p.q_len * p.value_dim));
  AttentionInputs inputs = c.inputs;
  inputs.side = side;
  make_method(spec)->attend(p, inputs,
                            {mutable_view_of(o.data(), DType::f32, {batch, p.q_heads, p.q_len, p.value_dim}), {}}, {});
  return o;
}

class GatedShapes : public testing::TestWithParam<test::CaseShape> {};

TEST_P(GatedShapes, IsTheOutputTimesTheSigmoid) {
  const AttentionCase c(GetParam());
  const std::int64_t dim = c.problem.value_dim;
  for (const std::string inner : {"dense", "streaming"}) {
    const std::vector<float> plain = output_of(inner, c, {});
    for (const std::int64_t width : {std::int64_t{1}, dim}) {
      const Gate gate(c, width);
      const std::vector<float> gated = output_of("gated:inner=" + inner, c, {gate.side(c)});
      for (std::size_t i = 0; i < plain.size(); ++i) {
        const float logit = gate.logits[width == 1 ? i / static_cast<std::size_t>(dim) : i];
        ASSERT_NEAR(gated[i], plain[i] / (1 + std::exp(-logit)), 1e-5F) << inner << " " << i;
      }
    }
  }
}
INSTANTIATE_TEST_SUITE_P(Shapes, GatedShapes, testing::ValuesIn(test::all_shapes()),
                         [](const auto& shape) { return shape.param.name; });

TEST(Gated, LargeLogitsAreNoGate) {
  const AttentionCase c({.name = "plain", .q_len = 30, .kv_len = 70});
  EXPECT_EQ(output_of("gated", c, {Gate(c, 1, 50).side(c)}), output_of("dense", c, {}));
}

TEST(Gated, RefusesBadGates) {
  const AttentionCase c({.name = "plain", .q_len = 30, .kv_len = 70});
  EXPECT_THROW(output_of("gated", c, {}), Error);
  EXPECT_THROW(output_of("gated", c, {Gate(c, 3).side(c)}), Error);
  SideTensor integers = Gate(c, 1).side(c);
  integers.view.dtype = DType::i32;
  EXPECT_THROW(output_of("gated", c, {integers}), Error);
  EXPECT_THROW(make_method("gated:inner=gated"), Error);
  EXPECT_THROW(make_method("gated:inner=densee"), Error);
}

}  // namespace
}  // namespace tessera
