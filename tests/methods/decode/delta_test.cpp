// delta: layer groups, the weight of pages, forced pages.
#include <numeric>
#include <set>

#include "methods/decode/decoding_step.h"

namespace tessera {
namespace {

using test::attend_dense;
using test::attend_layer;
using test::AttentionCase;
using test::decoding_shape;

/// Full layers 0, 1, 4; 1 and 4 choose. Pages of 8 tokens.
std::string spec(std::int64_t pages, std::int64_t recent) {
  return "delta:full_layers=0-1+4,page=8,pages=" + std::to_string(pages) + ",recent=" + std::to_string(recent);
}

/// Pages by definition: the sum over tokens of the largest probability of any head, the last ones forced.
std::vector<std::int32_t> expected_keys(const AttentionCase& input, std::int64_t s, std::int64_t pages,
                                        std::int64_t recent) {
  const std::int64_t keys = input.problem.kv_len;
  const std::int64_t count = (keys + 7) / 8;
  std::vector<double> mass(static_cast<std::size_t>(count), 0.0);
  std::vector<std::vector<double>> p;
  for (std::int64_t h = 0; h < input.problem.q_heads; ++h) p.push_back(input.probabilities(s, h, 0));
  for (std::int64_t j = 0; j < keys; ++j) {
    double best = 0;
    for (const auto& head : p) best = std::max(best, head[static_cast<std::size_t>(j)]);
    mass[static_cast<std::size_t>(j / 8)] += best;
  }
  for (std::int64_t b = std::max<std::int64_t>(0, count - recent); b < count; ++b)
    mass[static_cast<std::size_t>(b)] = 1e9;
  std::vector<std::int64_t> order;
  for (std::int64_t b = 0; b < count; ++b) order.push_back(b);
  std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) {
    return mass[static_cast<std::size_t>(a)] > mass[static_cast<std::size_t>(b)];
  });
  order.resize(static_cast<std::size_t>(std::min(count, pages)));
  std::sort(order.begin(), order.end());
  std::vector<std::int32_t> list;
  for (const std::int64_t b : order) {
    for (std::int64_t j = 8 * b; j < std::min(keys, 8 * b + 8); ++j) list.push_back(static_cast<std::int32_t>(j));
  }
  return list;
}

TEST(Delta, SparseLayersReadTheBestPages) {
  for (const std::int64_t keys : {161, 168, 300}) {
    for (const DType dtype : {DType::f32, DType::f16}) {
      const AttentionCase input(decoding_shape(keys, 6, 2, 2, dtype));
      const auto method = make_method(spec(7, 2));
      const auto state = method->new_state();
      for (std::int64_t layer = 0; layer < 7; ++layer) {
        const auto result = attend_layer(*method, input, layer, state.get());
        for (std::int64_t s = 0; s < 2; ++s) {
          for (std::int64_t h = 0; h < 6; ++h) {
            if (layer <= 1 || layer == 4) {
              EXPECT_EQ(result.keys(s, h).size(), static_cast<std::size_t>(keys));
            } else {
              EXPECT_EQ(result.keys(s, h), expected_keys(input, s, 7, 2)) << keys << " layer " << layer;
            }
          }
        }
      }
    }
  }
}

TEST(Delta, ShortSequencesRunDense) {
  for (const std::int64_t keys : {1, 40, 80}) {
    const AttentionCase input(decoding_shape(keys));
    const auto method = make_method(spec(10, 2));
    const auto state = method->new_state();
    const auto dense = attend_dense(input);
    for (std::int64_t layer = 0; layer < 6; ++layer) {
      EXPECT_EQ(attend_layer(*method, input, layer, state.get()).o, dense.o) << keys << " layer " << layer;
    }
  }
  const AttentionCase longer(decoding_shape(81));
  const auto method = make_method(spec(10, 2));
  const auto state = method->new_state();
  attend_layer(*method, longer, 1, state.get());
  EXPECT_EQ(attend_layer(*method, longer, 2, state.get()).keys(0, 0).size(), 73U) << "9 whole pages and a token";
  const auto patient = make_method(spec(10, 2) + ",ratio=2");
  const auto patient_state = patient->new_state();
  attend_layer(*patient, longer, 1, patient_state.get());
  EXPECT_EQ(attend_layer(*patient, longer, 2, patient_state.get()).keys(0, 0).size(), 81U);
}

TEST(Delta, AKeyThatOneHeadWantsIsRead) {
  AttentionCase input(decoding_shape(400, 8, 2));
  for (std::int64_t d = 0; d < 16; ++d) {
    input.set_q(0, 5, 0, d, d == 3 ? 40.0F : 0.0F);
    input.set_k(0, 1, 123, d, d == 3 ? 8.0F : 0.0F);
  }
  ASSERT_GT(input.probabilities(0, 5, 0)[123], 0.99);
  const auto method = make_method(spec(4, 2));
  const auto state = method->new_state();
  attend_layer(*method, input, 1, state.get());
  const auto keys = attend_layer(*method, input, 2, state.get()).keys(0, 0);
  EXPECT_TRUE(std::binary_search(keys.begin(), keys.end(), 123));
}

TEST(Delta, UndefinedScoresDoNotTakeTheBudget) {
  AttentionCase input(decoding_shape(200, 2, 2));
  input.set_q(0, 0, 0, 0, std::numeric_limits<float>::quiet_NaN());
  const auto method = make_method(spec(5, 1));
  const auto state = method->new_state();
  attend_layer(*method, input, 1, state.get());
  // The pages are those that the head with defined scores wants: NaN is worth nothing, not everything.
  const auto p = input.probabilities(0, 1, 0);
  std::vector<std::pair<double, std::int32_t>> pages;
  for (std::int32_t b = 0; b + 1 < 25; ++b) {
    pages.emplace_back(-std::accumulate(p.begin() + b * 8, p.begin() + b * 8 + 8, 0.0), b);
  }
  std::sort(pages.begin(), pages.end());
  std::set<std::int32_t> expected{24};  // the last page is forced
  for (std::size_t i = 0; i < 4; ++i) expected.insert(pages[i].second);
  std::set<std::int32_t> chosen;
  for (const std::int32_t key : attend_layer(*method, input, 2, state.get()).keys(0, 1)) chosen.insert(key / 8);
  EXPECT_EQ(chosen, expected);
}

TEST(Delta, TheLastLayerOfAModelChoosesForNobody) {
  const AttentionCase input(decoding_shape(200));
  const auto method = make_method(spec(5, 1));
  const auto state = method->new_state();
  const auto scores_of = [&](std::int64_t layers) {
    PlanContext context;
    context.layer = 4;
    context.layers = layers;
    context.state = state.get();
    std::vector<float> o(4 * 8);
    method->attend(input.problem, input.inputs, {mutable_view_of(o.data(), DType::f32, {1, 4, 1, 8}), {}}, context);
    context.layer = 5;
    return statistics(method->plan(input.problem, input.inputs, context)).density;
  };
  EXPECT_DOUBLE_EQ(scores_of(5), 1) << "nothing was chosen";
  EXPECT_LT(scores_of(6), 0.3);
}

TEST(Delta, DoesNotDependOnThreads) {
  const AttentionCase input(decoding_shape(3000, 8, 2));
  const auto method = make_method("delta:full_layers=0,pages=20,recent=2");
  std::vector<float> expected;
  for (const int threads : {1, 2, 3}) {
    const auto state = method->new_state();
    attend_layer(*method, input, 0, state.get(), threads);
    const auto result = attend_layer(*method, input, 1, state.get(), threads);
    if (threads == 1) expected = result.o;
    EXPECT_EQ(result.o, expected) << threads;
    EXPECT_EQ(result.keys(0, 0).size(), 19 * 16U + 8);
  }
}

TEST(Delta, RefusesBadParameters) {
  EXPECT_THROW(make_method("delta:full_layers=1+2"), Error);
  EXPECT_THROW(make_method("delta:full_layers=0-x"), Error);
  EXPECT_THROW(make_method("delta:full_layers=0+3-2"), Error);
  EXPECT_THROW(make_method("delta:full_layers="), Error);
  EXPECT_THROW(make_method("delta:full_layers=0-999999999"), Error);
  EXPECT_THROW(make_method("delta:pages=4,recent=5"), Error);
  EXPECT_THROW(make_method("delta:page=0"), Error);
}

}  // namespace
}  // namespace tessera
