// dense keeps every pair that the problem allows.
#include <gtest/gtest.h>

#include "methods/masks.h"

namespace tessera {
namespace {

using test::AttentionCase;
using test::CaseShape;
using test::masks_of;
using test::masks_where;

class DenseShapes : public testing::TestWithParam<CaseShape> {};

TEST_P(DenseShapes, KeepsWhatTheProblemAllows) {
  const AttentionCase input(GetParam());
  const auto expected = masks_where(input, [&](auto s, auto, auto n, auto j) { return input.allowed(s, n, j); });
  EXPECT_TRUE(masks_of("dense", input) == expected);
}

INSTANTIATE_TEST_SUITE_P(Shapes, DenseShapes, testing::ValuesIn(test::all_shapes()),
                         [](const auto& shape) { return shape.param.name; });

TEST(Dense, NeedsNoTensors) {
  Problem problem;
  problem.q_len = problem.kv_len = 1000;
  problem.head_dim = problem.value_dim = 64;
  problem.causal = true;
  EXPECT_NO_THROW(validate(make_method("dense")->plan(problem, {}, {})));
}

}  // namespace
}  // namespace tessera
