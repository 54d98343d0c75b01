// MoBA: the router by definition, the facts of its description, and gradients.
#include <gtest/gtest.h>

#include <algorithm>

#include "methods/masks.h"
#include "tessera/gradient.h"

namespace tessera {
namespace {

using test::AttentionCase;
using test::CaseShape;
using test::HeadMask;
using test::masks_of;

class MobaShapes : public testing::TestWithParam<CaseShape> {};

TEST_P(MobaShapes, FullBudgetIsDense) {
  const AttentionCase input(GetParam());
  for (const std::string spec : {"moba:block_size=32,top_k=100", "moba:block_size=7,top_k=1000",
                                 "moba:block_size=100000,top_k=1", "moba:block_size=16,dense_last_layers=1"}) {
    test::expect_full_budget_is_dense(*make_method(spec), input);
  }
}

TEST_P(MobaShapes, PlansHold) {
  const AttentionCase input(GetParam());
  for (const std::string spec : {"moba:block_size=32,top_k=2", "moba:block_size=7,top_k=3"}) {
    test::expect_plans_hold(*make_method(spec), input);
  }
}

/// The selection written down plainly: double sums, every block compared with every other.
std::vector<HeadMask> expected_masks(const AttentionCase& input, std::int64_t size, std::int64_t k) {
  const Problem& problem = input.problem;
  const std::int64_t dim = problem.head_dim;
  return test::masks_where(input, [&](std::int64_t s, std::int64_t h, std::int64_t n, std::int64_t j) {
    if (!input.allowed(s, n, j)) return false;
    const std::int64_t keys = problem.kv_len_of(s);
    const std::int64_t position = test::position(input, s, n);
    const auto score = [&](std::int64_t b) {
      const std::int64_t first = b * size;
      const std::int64_t end = std::min(first + size, keys);
      double sum = 0;
      for (std::int64_t key = first; key < end; ++key) {
        for (std::int64_t d = 0; d < dim; ++d) {
          sum += static_cast<double>(input.q(s, h, n, d)) * input.k(s, h / problem.group(), key, d);
        }
      }
      return sum / static_cast<double>(end - first);
    };
    const std::int64_t own = position < 0 ? -1 : position / size;
    const std::int64_t mine = j / size;
    if (mine == own) return true;
    const std::int64_t blocks = (keys + size - 1) / size;
    std::int64_t better = own >= 0 && own < blocks ? 1 : 0;  // the own block takes a place
    const double own_score = score(mine);
    for (std::int64_t b = 0; b < blocks; ++b) {
      if (b == mine || b == own || (problem.causal && b > own)) continue;
      const double other = score(b);
      if (other > own_score || (other == own_score && b < mine)) ++better;
    }
    return better < k;
  });
}

TEST(Moba, RoutesByDefinition) {
  const std::vector<CaseShape> shapes{
      {.name = "square", .q_len = 75, .kv_len = 75, .head_dim = 8},
      {.name = "chunk", .q_heads = 4, .kv_heads = 2, .q_len = 20, .kv_len = 83, .head_dim = 8},
      {.name = "variable", .head_dim = 8, .q_lens = {30, 0, 1, 9}, .kv_lens = {61, 10, 40, 9}},
      {.name = "bidirectional", .q_len = 30, .kv_len = 50, .causal = false, .head_dim = 8},
      {.name = "beyond", .q_len = 10, .kv_len = 50, .head_dim = 8, .q_offset = 60},
  };
  for (const CaseShape& shape : shapes) {
    const AttentionCase input(shape, 5);
    for (const std::int64_t k : {1, 2, 4}) {
      const std::string spec = "moba:block_size=16,top_k=" + std::to_string(k);
      EXPECT_TRUE(masks_of(spec, input) == expected_masks(input, 16, k)) << spec << " " << shape.name;
    }
  }
}

TEST(Moba, OneBlockIsBlockDiagonal) {
  const AttentionCase input({.name = "square", .q_len = 130, .kv_len = 130});
  const auto expected = test::masks_where(
      input, [&](std::int64_t, std::int64_t, std::int64_t n, std::int64_t j) { return j <= n && j / 32 == n / 32; });
  EXPECT_TRUE(masks_of("moba:block_size=32,top_k=1", input) == expected);
}

TEST(Moba, PlantedBlockIsChosen) {
  AttentionCase input({.name = "square", .q_len = 160, .kv_len = 160});
  // Every key of block 2 points where the last query of head 1 looks.
  for (std::int64_t d = 0; d < 16; ++d) {
    for (std::int64_t j = 64; j < 96; ++j) input.set_k(0, 0, j, d, input.q(0, 1, 159, d));
  }
  const HeadMask head = masks_of("moba:block_size=32,top_k=2", input)[1];
  for (std::int64_t j = 0; j < 160; ++j) EXPECT_EQ(head.at(159, j), (j >= 64 && j < 96) || j >= 128);
}

TEST(Moba, OrderInsideAPastBlockDoesNotMatter) {
  AttentionCase input({.name = "square", .q_len = 128, .kv_len = 128});
  const auto before = masks_of("moba:block_size=32,top_k=2", input);
  for (std::int64_t d = 0; d < 16; ++d) {
    const float first = input.k(0, 0, 3, d);
    input.set_k(0, 0, 3, d, input.k(0, 0, 20, d));
    input.set_k(0, 0, 20, d, first);
  }
  const auto after = masks_of("moba:block_size=32,top_k=2", input);
  for (std::size_t h = 0; h < before.size(); ++h) {
    for (std::int64_t n = 32; n < 128; ++n) {
      for (std::int64_t j = 0; j < 128; ++j) ASSERT_EQ(before[h].at(n, j), after[h].at(n, j));
    }
  }
}

TEST(Moba, EqualScoresAreCutToExactlyK) {
  AttentionCase input({.name = "square", .q_len = 128, .kv_len = 128});
  for (std::int64_t j = 0; j < 128; ++j) {
    for (std::int64_t d = 0; d < 16; ++d) input.set_k(0, 0, j, d, 0.5F);
  }
  const HeadMask head = masks_of("moba:block_size=16,top_k=3", input)[0];
  for (std::int64_t j = 0; j < 128; ++j) EXPECT_EQ(head.at(127, j), j < 32 || j >= 112);
}

TEST(Moba, SelectionOfQueriesRunsKeyMajor) {
  const AttentionCase input({.name = "square", .q_heads = 4, .kv_heads = 2, .q_len = 200, .kv_len = 200});
  std::vector<float> o(4 * 200 * 8);
  const auto report =
      make_method("moba:block_size=32,top_k=2")
          ->attend(input.problem, input.inputs, {mutable_view_of(o.data(), DType::f32, {1, 4, 200, 8}), {}}, {});
  EXPECT_EQ(report.kernel, KernelKind::key_major);
}

/// Gradients are those of dense attention under the mask of the selection, in float64.
TEST(Moba, BackwardIsThatOfTheMask) {
  const AttentionCase input({.name = "chunk", .q_heads = 4, .kv_heads = 2, .q_len = 60, .kv_len = 90});
  const Problem& problem = input.problem;
  const auto method = make_method("moba:block_size=16,top_k=2");
  std::vector<float> o(4 * 60 * 8);
  std::vector<float> lse(4 * 60);
  Plan plan;
  const auto o_view = mutable_view_of(o.data(), DType::f32, {1, 4, 60, 8});
  method->attend(problem, input.inputs, {o_view, lse}, {}, &plan);
  std::vector<float> d_o(o.size());
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  for (float& x : d_o) x = normal(random);
  SavedForward saved;
  saved.o = o_view;
  saved.lse = lse;
  saved.d_o = view_of(d_o.data(), DType::f32, {1, 4, 60, 8});
  struct Memory {
    std::vector<float> q = std::vector<float>(4 * 60 * 16);
    std::vector<float> k = std::vector<float>(2 * 90 * 16);
    std::vector<float> v = std::vector<float>(2 * 90 * 8);
    Gradients gradients() {
      Gradients views;
      views.d_q = mutable_view_of(q.data(), DType::f32, {1, 4, 60, 16});
      views.d_k = mutable_view_of(k.data(), DType::f32, {1, 2, 90, 16});
      views.d_v = mutable_view_of(v.data(), DType::f32, {1, 2, 90, 8});
      return views;
    }
  };
  Memory actual;
  EXPECT_EQ(method->backward(problem, input.inputs, saved, actual.gradients(), {}).kernel, KernelKind::key_major);
  Memory again;
  method->backward(problem, input.inputs, saved, again.gradients(), {}, &plan);
  EXPECT_EQ(actual.q, again.q);
  EXPECT_EQ(actual.k, again.k);
  EXPECT_EQ(actual.v, again.v);
  Memory expected;
  RunOptions reference;
  reference.kernel = KernelKind::reference;
  run_backward(plan_from_mask(problem, dense_mask(plan), 16, 16), input.inputs, saved, expected.gradients(), reference);
  const auto compare = [](const std::vector<float>& a, const std::vector<float>& b) {
    for (std::size_t i = 0; i < a.size(); ++i) ASSERT_NEAR(a[i], b[i], 1e-4) << i;
  };
  compare(actual.q, expected.q);
  compare(actual.k, expected.k);
  compare(actual.v, expected.v);
}

TEST(Moba, RefusesBadParameters) {
  EXPECT_THROW(make_method("moba:block_size=0"), Error);
  EXPECT_THROW(make_method("moba:top_k=0"), Error);
}

INSTANTIATE_TEST_SUITE_P(Shapes, MobaShapes, testing::ValuesIn(test::all_shapes()),
                         [](const auto& shape) { return shape.param.name; });

}  // namespace
}  // namespace tessera
