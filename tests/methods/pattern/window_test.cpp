// window against the formula of its definition.
#include <gtest/gtest.h>

#include "methods/masks.h"

namespace tessera {
namespace {

using test::AttentionCase;
using test::CaseShape;
using test::masks_of;
using test::masks_where;
using test::position;

class WindowShapes : public testing::TestWithParam<CaseShape> {};

TEST_P(WindowShapes, IsInclusiveOnBothSides) {
  const AttentionCase input(GetParam());
  for (const auto& [left, right] : std::vector<std::pair<int, int>>{{0, 0}, {40, 0}, {5, 7}, {-1, 3}, {200, -1}}) {
    const auto expected = masks_where(input, [&, l = left, r = right](auto s, auto, auto n, auto j) {
      const std::int64_t p = position(input, s, n);
      return input.allowed(s, n, j) && (l < 0 || j >= p - l) && (r < 0 || j <= p + r);
    });
    EXPECT_TRUE(masks_of("window:left=" + std::to_string(left) + ",right=" + std::to_string(right), input) == expected)
        << left << ", " << right;
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, WindowShapes, testing::ValuesIn(test::all_shapes()),
                         [](const auto& shape) { return shape.param.name; });

TEST(Window, NeedsNoTensors) {
  Problem problem;
  problem.q_len = problem.kv_len = 1000;
  problem.head_dim = problem.value_dim = 64;
  problem.causal = true;
  EXPECT_NO_THROW(validate(make_method("window")->plan(problem, {}, {})));
}

}  // namespace
}  // namespace tessera
