// quest: bounds of pages against their definition, kept incrementally; the pages that a decoded query reads.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "methods/masks.h"
#include "methods/page_bounds.h"

namespace tessera {
namespace {

using test::AttentionCase;
using test::CaseShape;
using test::masks_of;
using test::masks_where;

const CaseShape kDecode{.name = "decode", .q_heads = 4, .kv_heads = 2, .q_len = 1, .kv_len = 333};

/// The first `keys` keys of a case, with its queries at their end.
struct Prefix {
  Prefix(const AttentionCase& input, std::int64_t keys) : problem(input.problem), inputs(input.inputs) {
    problem.kv_len = keys;
    if (!inputs.pages.used()) inputs.k.shape[2] = inputs.v.shape[2] = keys;
  }
  Problem problem;
  AttentionInputs inputs;
};

/// u_b of one query by its definition.
std::vector<double> bounds_of(const AttentionCase& input, std::int64_t q_head, std::int64_t row, std::int64_t keys,
                              std::int64_t page) {
  const std::int64_t head = q_head / input.problem.group();
  std::vector<double> bounds;
  for (std::int64_t begin = 0; begin < keys; begin += page) {
    double bound = 0;
    for (std::int64_t d = 0; d < input.problem.head_dim; ++d) {
      double largest = -INFINITY;
      double smallest = INFINITY;
      for (std::int64_t j = begin; j < std::min(keys, begin + page); ++j) {
        largest = std::max(largest, static_cast<double>(input.k(0, head, j, d)));
        smallest = std::min(smallest, static_cast<double>(input.k(0, head, j, d)));
      }
      const double q = input.q(0, q_head, row, d);
      bound += std::max(q * largest, q * smallest);
    }
    bounds.push_back(bound);
  }
  return bounds;
}

std::vector<float> query_of(const AttentionCase& input, std::int64_t q_head) {
  std::vector<float> query;
  for (std::int64_t d = 0; d < input.problem.head_dim; ++d) query.push_back(input.q(0, q_head, 0, d));
  return query;
}

TEST(PageBounds, AreAtLeastEveryProductOfThePage) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    for (const std::int64_t page_size : {0, 16}) {
      for (const std::int64_t page : {1, 7, 16, 64}) {
        CaseShape shape = kDecode;
        shape.dtype = dtype;
        shape.page_size = page_size;
        const AttentionCase input(shape);
        PageBounds bounds;
        bounds.update(input.problem, input.inputs, 0, 1, page, 332);
        std::vector<float> upper;
        bounds.upper_bounds(query_of(input, 3).data(), (333 + page - 1) / page, upper);
        const auto expected = bounds_of(input, 3, 0, 333, page);
        ASSERT_EQ(upper.size(), expected.size());
        for (std::int64_t b = 0; b < std::ssize(expected); ++b) {
          EXPECT_NEAR(upper[static_cast<std::size_t>(b)], expected[static_cast<std::size_t>(b)], 1e-4);
          for (std::int64_t j = b * page; j < std::min<std::int64_t>(333, (b + 1) * page); ++j) {
            double product = 0;
            for (std::int64_t d = 0; d < 16; ++d) product += input.q(0, 3, 0, d) * input.k(0, 1, j, d);
            EXPECT_GE(upper[static_cast<std::size_t>(b)], product - 1e-4);
          }
        }
      }
    }
  }
}

TEST(PageBounds, AreExactForEqualKeysAndIgnoreEmptySlots) {
  AttentionCase input({.name = "equal", .q_heads = 1, .kv_heads = 1, .q_len = 1, .kv_len = 21});
  for (std::int64_t j = 0; j < 21; ++j) {
    for (std::int64_t d = 0; d < 16; ++d) input.set_k(0, 0, j, d, static_cast<float>(d) + 1);
  }
  PageBounds bounds;
  bounds.update(input.problem, input.inputs, 0, 0, 16, 20);
  std::vector<float> upper;
  bounds.upper_bounds(query_of(input, 0).data(), 2, upper);
  double product = 0;
  for (std::int64_t d = 0; d < 16; ++d) product += input.q(0, 0, 0, d) * (static_cast<double>(d) + 1);
  // The second page has 5 keys: eleven zeros among them would widen its bounds.
  for (const float bound : upper) EXPECT_NEAR(bound, product, 1e-4);
}

TEST(PageBounds, GrowWithTheSequence) {
  for (const std::int64_t page_size : {0, 16}) {
    CaseShape shape = kDecode;
    shape.page_size = page_size;
    const AttentionCase input(shape);
    PageBounds step_by_step;
    std::int64_t keys = 0;
    for (const std::int64_t count : {100, 1, 1, 10, 1, 40, 1, 1, 16, 1}) {
      keys += count;
      const Prefix prefix(input, keys);
      step_by_step.update(prefix.problem, prefix.inputs, 0, 0, 16, keys - count);
      PageBounds at_once;
      at_once.update(prefix.problem, prefix.inputs, 0, 0, 16, 0);
      ASSERT_EQ(step_by_step.numbers, at_once.numbers) << keys;
    }
    // A shorter sequence than before: what came after is forgotten.
    const Prefix shorter(input, 50);
    step_by_step.update(shorter.problem, shorter.inputs, 0, 0, 16, 49);
    PageBounds at_once;
    at_once.update(shorter.problem, shorter.inputs, 0, 0, 16, 0);
    EXPECT_EQ(step_by_step.numbers, at_once.numbers);
  }
}

TEST(PageBounds, ReadOnlyTheKeysOfTheirOwnPageAgain) {
  AttentionCase input(kDecode);
  const Prefix before(input, 100);
  PageBounds bounds;
  bounds.update(before.problem, before.inputs, 0, 0, 16, 99);
  const std::vector<float> old = bounds.numbers;
  input.set_k(0, 0, 20, 0, 1e6F);   // settled long ago: must not be read again
  input.set_k(0, 0, 100, 0, 2e6F);  // new
  input.set_k(0, 0, 99, 1, 3e6F);   // of the pass before, which may have failed: read again
  const Prefix after(input, 101);
  bounds.update(after.problem, after.inputs, 0, 0, 16, 100);
  EXPECT_TRUE(std::equal(old.begin(), old.begin() + 6 * 32, bounds.numbers.begin()));
  EXPECT_EQ(bounds.numbers[6 * 32], 2e6F);
  EXPECT_EQ(bounds.numbers[6 * 32 + 1], 3e6F);
}

/// The best `wanted` of the pages, the last one among them.
std::vector<bool> best_pages(const std::vector<double>& scores, std::int64_t wanted) {
  std::vector<std::size_t> order(scores.size() - 1);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return scores[a] > scores[b]; });
  std::vector<bool> chosen(scores.size());
  chosen.back() = true;
  for (std::int64_t i = 0; i < std::min<std::int64_t>(wanted - 1, std::ssize(order)); ++i) chosen[order[i]] = true;
  return chosen;
}

TEST(Quest, ChoosesTheBestPagesAndTheLast) {
  for (const std::string group : {"none", "mean", "max", "union"}) {
    for (const std::int64_t page_size : {0, 32}) {
      CaseShape shape = kDecode;
      shape.page_size = page_size;
      const AttentionCase input(shape);
      std::vector<std::vector<bool>> chosen;
      for (std::int64_t head = 0; head < 4; head += 2) {
        const auto a = bounds_of(input, head, 0, 333, 16);
        const auto b = bounds_of(input, head + 1, 0, 333, 16);
        std::vector<double> joint;
        for (std::size_t i = 0; i < a.size(); ++i) {
          joint.push_back(group == "mean" ? a[i] + b[i] : std::max(a[i], b[i]));
        }
        auto own_a = best_pages(group == "none" || group == "union" ? a : joint, 4);
        auto own_b = best_pages(group == "none" || group == "union" ? b : joint, 4);
        if (group == "union") {
          for (std::size_t i = 0; i < a.size(); ++i) own_a[i] = own_b[i] = own_a[i] || own_b[i];
        }
        chosen.push_back(own_a);
        chosen.push_back(own_b);
      }
      const auto expected = masks_where(input, [&](auto, auto h, auto, auto j) {
        return static_cast<bool>(chosen[static_cast<std::size_t>(h)][static_cast<std::size_t>(j / 16)]);
      });
      EXPECT_TRUE(masks_of("quest:dense_layers=0,budget=64,group=" + group, input) == expected) << group;
    }
  }
}

TEST(Quest, KeepsTheLastPageThoughItsBoundIsTheLowest) {
  AttentionCase input(kDecode);
  for (std::int64_t head = 0; head < 4; ++head) {
    for (std::int64_t d = 0; d < 16; ++d) input.set_q(0, head, 0, d, 1);
  }
  for (std::int64_t head = 0; head < 2; ++head) {
    for (std::int64_t j = 320; j < 333; ++j) {
      for (std::int64_t d = 0; d < 16; ++d) input.set_k(0, head, j, d, -50);
    }
  }
  for (const auto& mask : masks_of("quest:dense_layers=0,budget=16", input)) {
    EXPECT_TRUE(mask.at(0, 332));
    EXPECT_TRUE(mask.at(0, 320));
    // At least three pages, although the budget is one.
    EXPECT_EQ(std::accumulate(mask.bits.begin(), mask.bits.end(), 0), 2 * 16 + 13);
  }
}

TEST(Quest, RowsChooseForThemselvesAmongThePagesTheySee) {
  const AttentionCase input({.name = "rows", .q_heads = 2, .kv_heads = 1, .q_len = 5, .kv_len = 200});
  const auto masks = masks_of("quest:dense_layers=0,budget=48,decode_rows=5", input);
  for (std::int64_t head = 0; head < 2; ++head) {
    for (std::int64_t row = 0; row < 5; ++row) {
      const std::int64_t position = 195 + row;
      // Rows share the bounds of the pass: those of a page that a row sees in part count its later keys too.
      auto scores = bounds_of(input, head, row, 200, 16);
      scores.resize(static_cast<std::size_t>(position / 16 + 1));
      const auto chosen = best_pages(scores, 3);
      for (std::int64_t j = 0; j < 200; ++j) {
        const bool expected = j <= position && chosen[static_cast<std::size_t>(j / 16)];
        ASSERT_EQ(masks[static_cast<std::size_t>(head)].at(row, j), expected) << row << " " << j;
      }
    }
  }
}

TEST(Quest, IsDenseWhereItShouldBe) {
  const AttentionCase input(kDecode);
  const auto dense = test::dense_masks(input);
  EXPECT_TRUE(masks_of("quest:dense_layers=0,budget=333", input) == dense) << "the whole sequence";
  EXPECT_FALSE(masks_of("quest:dense_layers=0,budget=320", input) == dense);
  const auto method = make_method("quest:budget=64");
  for (const std::int64_t layer : {0, 1}) EXPECT_TRUE(masks_of(*method, input, 0, layer) == dense) << layer;
  EXPECT_FALSE(masks_of(*method, input, 0, 2) == dense);
  const AttentionCase prompt({.name = "prompt", .q_len = 300, .kv_len = 300});
  EXPECT_TRUE(masks_of("quest:dense_layers=0,budget=64", prompt) == test::dense_masks(prompt));
}

TEST(Quest, PlansHoldForAllInputs) {
  for (const CaseShape& shape : test::all_shapes()) {
    const AttentionCase input(shape);
    for (const std::string spec : {"quest:dense_layers=0,budget=32,decode_rows=1024",
                                   "quest:dense_layers=0,budget=32,decode_rows=1024,group=union,page=5"}) {
      // Queries before the first key see nothing, which dense plans do not count as a row.
      if (shape.q_offset || shape.name == "more_queries_than_keys") {
        EXPECT_NO_THROW(masks_of(spec, input)) << shape.name;
      } else {
        test::expect_plans_hold(*make_method(spec), input);
      }
    }
    test::expect_full_budget_is_dense(*make_method("quest:dense_layers=0,decode_rows=1024,budget=100000"), input);
  }
}

TEST(Quest, StateChangesNothingButTheWork) {
  const AttentionCase input(kDecode);
  for (const std::string group : {"none", "max"}) {
    const auto method = make_method("quest:dense_layers=0,budget=64,group=" + group);
    const auto state = method->new_state();
    for (const std::int64_t keys : {120, 121, 122, 200, 201, 80, 81, 333}) {
      const Prefix prefix(input, keys);
      PlanContext with;
      with.state = state.get();
      EXPECT_TRUE(method->plan(prefix.problem, prefix.inputs, with) == method->plan(prefix.problem, prefix.inputs, {}))
          << keys;
    }
    EXPECT_GT(state->memory_bytes(), 0U);
  }
}

TEST(Quest, KeepsAnUndefinedKeyAndAPlantedNeedle) {
  AttentionCase input(kDecode);
  input.set_k(0, 0, 40, 3, NAN);
  EXPECT_TRUE(masks_of("quest:dense_layers=0,budget=48", input)[0].at(0, 40));
  AttentionCase needle(kDecode);
  for (std::int64_t head = 0; head < 4; ++head) needle.set_q(0, head, 0, 0, 6);
  for (std::int64_t head = 0; head < 2; ++head) needle.set_k(0, head, 200, 0, 30);
  for (const auto& mask : masks_of("quest:dense_layers=0,budget=48", needle)) EXPECT_TRUE(mask.at(0, 200));
}

TEST(Quest, RunsInTheSplitKeyKernel) {
  CaseShape shape = kDecode;
  shape.page_size = 16;
  const AttentionCase input(shape);
  const auto method = make_method("quest:dense_layers=0,budget=64");
  std::vector<float> o(4 * 8);
  std::vector<float> expected(4 * 8);
  const auto outputs = [](std::vector<float>& out) {
    return AttentionOutputs{mutable_view_of(out.data(), DType::f32, {1, 4, 1, 8}), {}};
  };
  EXPECT_EQ(method->attend(input.problem, input.inputs, outputs(o), {}).kernel, KernelKind::split_key);
  PlanContext reference;
  reference.run.kernel = KernelKind::reference;
  method->attend(input.problem, input.inputs, outputs(expected), reference);
  for (std::size_t i = 0; i < o.size(); ++i) EXPECT_NEAR(o[i], expected[i], 1e-5);
}

}  // namespace
}  // namespace tessera
