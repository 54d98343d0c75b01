// Tri-shape against the formula of its definition, and the layers it runs in.
#include <gtest/gtest.h>

#include "methods/masks.h"

namespace tessera {
namespace {

using test::AttentionCase;
using test::CaseShape;
using test::masks_of;
using test::masks_where;
using test::position;

class TriShapes : public testing::TestWithParam<CaseShape> {};

TEST_P(TriShapes, IsAShapeWithDenseLastRows) {
  const AttentionCase input(GetParam());
  const auto method = make_method("tri-shape:n_init=5,n_local=40,n_last=30");
  if (!input.problem.causal) {
    EXPECT_THROW(method->plan(input.problem, input.inputs, {}), Error);
    return;
  }
  const auto expected = masks_where(input, [&](auto s, auto, auto n, auto j) {
    if (!input.allowed(s, n, j)) return false;
    return j < 5 || position(input, s, n) - j < 40 || n >= input.problem.q_len_of(s) - 30;
  });
  EXPECT_TRUE(masks_of(*method, input) == expected);
  test::expect_full_budget_is_dense(*make_method("tri-shape:n_local=100000"), input);
  test::expect_full_budget_is_dense(*make_method("tri-shape:n_init=0,n_local=1,n_last=100000"), input);
}

INSTANTIATE_TEST_SUITE_P(Shapes, TriShapes, testing::ValuesIn(test::all_shapes()),
                         [](const auto& shape) { return shape.param.name; });

TEST(TriShape, LayersBelowTheStartingOneAreDense) {
  const AttentionCase input({.name = "layers", .q_len = 300, .kv_len = 300});
  const auto method = make_method("tri-shape:n_init=4,n_local=16,n_last=2,starting_layer=3");
  const auto dense = test::dense_masks(input);
  for (std::int64_t layer = 0; layer < 5; ++layer) {
    EXPECT_EQ(masks_of(*method, input, 0, layer) == dense, layer < 3) << layer;
  }
}

}  // namespace
}  // namespace tessera
