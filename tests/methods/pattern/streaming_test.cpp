// streaming against the formula of its definition; the A-shape of minference is the same.
#include <gtest/gtest.h>

#include "methods/masks.h"

namespace tessera {
namespace {

using test::AttentionCase;
using test::CaseShape;
using test::masks_of;
using test::masks_where;
using test::position;

class StreamingShapes : public testing::TestWithParam<CaseShape> {};

TEST_P(StreamingShapes, IsSinksPlusWindowPlusDenseTail) {
  const AttentionCase input(GetParam());
  struct Sizes {
    int init, local, last;
  };
  for (const Sizes& size :
       {Sizes{4, 50, 0}, Sizes{0, 1, 0}, Sizes{150, 20, 0}, Sizes{10, 30, 9}, Sizes{3, 64, 140}, Sizes{200, 300, 1}}) {
    const auto expected = masks_where(input, [&](auto s, auto, auto n, auto j) {
      const std::int64_t p = position(input, s, n);
      if (!input.allowed(s, n, j)) return false;
      return j < size.init || std::abs(p - j) < size.local || n >= input.problem.q_len_of(s) - size.last;
    });
    const std::string spec = "streaming:n_init=" + std::to_string(size.init) +
                             ",n_local=" + std::to_string(size.local) + ",n_last=" + std::to_string(size.last);
    EXPECT_TRUE(masks_of(spec, input) == expected) << spec;
    if (!input.problem.causal || size.last > 0) continue;
    const std::string head =
        "minference:pattern=stream_llm,n_init=" + std::to_string(size.init) + ",n_local=" + std::to_string(size.local);
    EXPECT_TRUE(masks_of(head, input) == expected) << head;
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, StreamingShapes, testing::ValuesIn(test::all_shapes()),
                         [](const auto& shape) { return shape.param.name; });

TEST(Streaming, PlanOfTheTailIsProportionalToItsEntries) {
  // The tail cuts through one query tile only; the others need no bitmask.
  Problem problem;
  problem.q_len = problem.kv_len = 20000;
  problem.head_dim = problem.value_dim = 64;
  problem.causal = true;
  const Plan plan = make_method("streaming:n_init=4,n_local=512,n_last=100")->plan(problem, {}, {});
  EXPECT_LE(plan.mask_words.size(), 128U * (20000 / 64 + 1));
  EXPECT_LE(plan.entries.size(), 2U * static_cast<std::size_t>(plan.rows()));
}

TEST(Streaming, NeedsNoTensors) {
  Problem problem;
  problem.q_len = problem.kv_len = 1000;
  problem.head_dim = problem.value_dim = 64;
  problem.causal = true;
  EXPECT_NO_THROW(validate(make_method("streaming")->plan(problem, {}, {})));
}

}  // namespace
}  // namespace tessera
