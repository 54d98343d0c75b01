// tidaldecode: which layers choose, what they choose, and what the others read.
#include "methods/decode/decoding_step.h"

namespace tessera {
namespace {

using test::attend_dense;
using test::attend_layer;
using test::AttentionCase;
using test::best_keys;
using test::decoding_shape;

/// Layers 0 and 1 dense, 2 chooses, 5 chooses anew.
std::string spec(std::int64_t budget, const std::string& more = "") {
  return "tidaldecode:select_layer=2,reselect_layer=5,budget=" + std::to_string(budget) + more;
}

TEST(TidalDecode, WholeBudgetIsDenseInEveryLayer) {
  for (const std::int64_t keys : {1, 2, 63, 200}) {
    const AttentionCase input(decoding_shape(keys, 4, 2, 2));
    const auto method = make_method(spec(200));
    const auto state = method->new_state();
    for (std::int64_t layer = 0; layer < 8; ++layer) {
      const auto result = attend_layer(*method, input, layer, state.get());
      const auto dense = attend_dense(input);
      for (std::size_t i = 0; i < dense.o.size(); ++i) ASSERT_NEAR(result.o[i], dense.o[i], 1e-5) << layer;
    }
  }
}

TEST(TidalDecode, ReusingLayersReadTheBestTokensOfEachHead) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const std::int64_t page_size : {0, 32}) {
      const AttentionCase input(decoding_shape(300, 4, 2, 2, dtype, page_size));
      const auto method = make_method(spec(17));
      const auto state = method->new_state();
      for (std::int64_t layer = 0; layer < 8; ++layer) {
        const auto result = attend_layer(*method, input, layer, state.get());
        for (std::int64_t s = 0; s < 2; ++s) {
          for (std::int64_t h = 0; h < 4; ++h) {
            const bool full = layer <= 2 || layer == 5;
            if (full) {
              EXPECT_EQ(result.keys(s, h).size(), 300U);
            } else {
              EXPECT_EQ(result.keys(s, h), best_keys(input.probabilities(s, h, 0), 17)) << layer << " " << h;
            }
          }
        }
      }
    }
  }
}

TEST(TidalDecode, FullAndChoosingLayersAreDenseBitByBit) {
  const AttentionCase input(decoding_shape(5000, 8, 2));
  const auto method = make_method(spec(64));
  const auto state = method->new_state();
  const auto dense = attend_dense(input);
  for (const std::int64_t layer : {0, 1, 2, 5}) {
    EXPECT_EQ(attend_layer(*method, input, layer, state.get()).o, dense.o) << layer;
  }
}

TEST(TidalDecode, ReselectionReplacesTheChoice) {
  const AttentionCase first(decoding_shape(200), 1);
  const AttentionCase second(decoding_shape(200), 2);
  const auto method = make_method(spec(20));
  const auto state = method->new_state();
  attend_layer(*method, first, 2, state.get());
  // Positions are those that layer 2 chose, whatever the layer's own keys are.
  EXPECT_EQ(attend_layer(*method, second, 4, state.get()).keys(0, 3), best_keys(first.probabilities(0, 3, 0), 20));
  attend_layer(*method, second, 5, state.get());
  EXPECT_EQ(attend_layer(*method, first, 6, state.get()).keys(0, 3), best_keys(second.probabilities(0, 3, 0), 20));
}

TEST(TidalDecode, TokensOutsideTheChoiceDoNotMatter) {
  AttentionCase input(decoding_shape(200));
  const auto method = make_method(spec(20));
  const auto state = method->new_state();
  attend_layer(*method, input, 2, state.get());
  const auto before = attend_layer(*method, input, 3, state.get());
  for (std::int64_t j = 0; j < 200; ++j) {
    for (std::int64_t kv_head = 0; kv_head < 2; ++kv_head) {
      const auto a = before.keys(0, 2 * kv_head);
      const auto b = before.keys(0, 2 * kv_head + 1);
      if (std::binary_search(a.begin(), a.end(), j) || std::binary_search(b.begin(), b.end(), j)) continue;
      for (std::int64_t d = 0; d < 16; ++d) input.set_k(0, kv_head, j, d, 50);
    }
  }
  EXPECT_EQ(attend_layer(*method, input, 3, state.get()).o, before.o);
}

TEST(TidalDecode, NewestTokenIsKeptAtABudgetOfOne) {
  const AttentionCase input(decoding_shape(77));
  const auto method = make_method(spec(1));
  const auto state = method->new_state();
  attend_layer(*method, input, 2, state.get());
  EXPECT_EQ(attend_layer(*method, input, 3, state.get()).keys(0, 0), std::vector<std::int32_t>{76});
}

TEST(TidalDecode, AGroupMayShareOneList) {
  const AttentionCase input(decoding_shape(150, 4, 2));
  for (const std::string share : {"max", "mean"}) {
    const auto method = make_method(spec(15, ",share=" + share));
    const auto state = method->new_state();
    attend_layer(*method, input, 2, state.get());
    const auto result = attend_layer(*method, input, 3, state.get());
    for (std::int64_t kv_head = 0; kv_head < 2; ++kv_head) {
      std::vector<double> joined(150);
      for (std::int64_t j = 0; j < 150; ++j) {
        double dots[2] = {0, 0};
        for (std::int64_t g = 0; g < 2; ++g) {
          for (std::int64_t d = 0; d < 16; ++d) {
            dots[g] += static_cast<double>(input.q(0, 2 * kv_head + g, 0, d)) * input.k(0, kv_head, j, d);
          }
        }
        joined[static_cast<std::size_t>(j)] = share == "max" ? std::max(dots[0], dots[1]) : dots[0] + dots[1];
      }
      EXPECT_EQ(result.keys(0, 2 * kv_head), best_keys(joined, 15)) << share;
      EXPECT_EQ(result.keys(0, 2 * kv_head + 1), best_keys(joined, 15)) << share;
    }
  }
}

TEST(TidalDecode, AChoiceServesItsOwnStepOnly) {
  const AttentionCase step(decoding_shape(100));
  const AttentionCase later(decoding_shape(101));
  const auto method = make_method(spec(10));
  const auto state = method->new_state();
  attend_layer(*method, step, 2, state.get());
  EXPECT_EQ(attend_layer(*method, later, 3, state.get()).keys(0, 0).size(), 101U);
  EXPECT_EQ(attend_layer(*method, step, 3, nullptr).keys(0, 0).size(), 100U) << "no state, no choice";
}

TEST(TidalDecode, AStateBelongsToItsSequencesAndHeads) {
  const AttentionCase one(decoding_shape(100));
  const AttentionCase two(decoding_shape(100, 4, 2, 2));
  const AttentionCase more_heads(decoding_shape(100, 8, 2));
  const auto method = make_method(spec(10));
  const auto state = method->new_state();
  attend_layer(*method, one, 2, state.get());
  PlanContext context;
  context.layer = 3;
  context.layers = 8;
  context.state = state.get();
  EXPECT_NO_THROW(method->plan(one.problem, one.inputs, context));
  EXPECT_THROW(method->plan(two.problem, two.inputs, context), Error);
  EXPECT_THROW(method->plan(more_heads.problem, more_heads.inputs, context), Error);
}

TEST(TidalDecode, PrefillIsDense) {
  const AttentionCase input({.name = "prefill", .q_len = 40, .kv_len = 100});
  const auto method = make_method(spec(10));
  const auto state = method->new_state();
  for (const std::int64_t layer : {0, 2, 3, 5, 6}) {
    const auto result = attend_layer(*method, input, layer, state.get());
    EXPECT_DOUBLE_EQ(statistics(result.plan).density, 1.0) << layer;
  }
}

TEST(TidalDecode, DoesNotDependOnThreads) {
  const AttentionCase input(decoding_shape(3000, 8, 2));
  const auto method = make_method(spec(100));
  std::vector<float> expected;
  for (const int threads : {1, 2, 3}) {
    const auto state = method->new_state();
    attend_layer(*method, input, 2, state.get(), threads);
    const auto result = attend_layer(*method, input, 3, state.get(), threads);
    if (threads == 1) expected = result.o;
    EXPECT_EQ(result.o, expected) << threads;
  }
}

TEST(TidalDecode, RefusesBadParameters) {
  EXPECT_THROW(make_method("tidaldecode:budget=0"), Error);
  EXPECT_THROW(make_method("tidaldecode:select_layer=-1"), Error);
  EXPECT_THROW(make_method("tidaldecode:share=median"), Error);
}

}  // namespace
}  // namespace tessera
