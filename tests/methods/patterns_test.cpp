// window and streaming against the formulas of their definitions.
#include <gtest/gtest.h>

#include "methods/masks.h"

namespace tessera {
namespace {

using test::AttentionCase;
using test::CaseShape;
using test::masks_of;
using test::masks_where;
using test::position;

class Patterns : public testing::TestWithParam<CaseShape> {};

TEST_P(Patterns, WindowIsInclusiveOnBothSides) {
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

TEST_P(Patterns, StreamingIsSinksPlusWindowPlusDenseTail) {
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

INSTANTIATE_TEST_SUITE_P(Shapes, Patterns, testing::ValuesIn(test::all_shapes()),
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

TEST(Patterns, NeedNoTensors) {
  Problem problem;
  problem.q_len = problem.kv_len = 1000;
  problem.head_dim = problem.value_dim = 64;
  problem.causal = true;
  for (const std::string spec : {"dense", "window", "streaming"}) {
    EXPECT_NO_THROW(validate(make_method(spec)->plan(problem, {}, {}))) << spec;
  }
  EXPECT_THROW(make_method("xattention")->plan(problem, {}, {}), Error);
}

}  // namespace
}  // namespace tessera
