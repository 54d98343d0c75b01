// NSA against its definition in float64: outputs, selection, decoding with a state, bad input.
#include <gtest/gtest.h>

#include <set>
#include <string>
#include <vector>

#include "methods/masks.h"
#include "methods/trainable/nsa_case.h"

namespace tessera {
namespace {

using test::all_settings;
using test::AttentionCase;
using test::CaseShape;
using test::NsaCase;
using test::NsaGradients;
using test::NsaSettings;

TEST(Nsa, OutputsAndSelectionByDefinition) {
  for (const NsaSettings& settings : all_settings()) {
    for (const auto& [q_len, kv_len] : {std::pair{20, 37}, std::pair{61, 61}, std::pair{1, 30}, std::pair{9, 9}}) {
      const NsaCase c(settings, q_len, kv_len);
      const auto expected_blocks = c.selection(c.numbers());
      const auto expected = c.outputs(c.numbers(), expected_blocks);
      std::vector<float> o(expected.size());
      Plan plan;
      make_method(settings.spec())
          ->attend(c.problem, c.inputs(), {mutable_view_of(o.data(), DType::f32, {1, 4, q_len, 5}), {}}, {}, &plan);
      validate(plan);
      const auto mask = dense_mask(plan);
      for (std::int64_t head = 0; head < 4; ++head) {
        for (std::int64_t n = 0; n < q_len; ++n) {
          for (std::int64_t j = 0; j < kv_len; ++j) {
            const bool wanted = j <= kv_len - q_len + n &&
                                expected_blocks[static_cast<std::size_t>(head / 2)][static_cast<std::size_t>(n)]
                                               [static_cast<std::size_t>(j / settings.block)];
            ASSERT_EQ(mask[static_cast<std::size_t>((head * q_len + n) * kv_len + j)] != 0, wanted)
                << settings.spec() << " head " << head << " query " << n << " key " << j;
          }
        }
      }
      for (std::size_t i = 0; i < o.size(); ++i) ASSERT_NEAR(o[i], expected[i], 1e-5) << settings.spec() << " " << i;
    }
  }
}

NsaSettings only(std::size_t branch) {
  NsaSettings settings;
  for (std::size_t m = 0; m < 3; ++m) settings.bias[m] = m == branch ? 100 : -100;
  return settings;
}

/// Output of a method on an NsaCase without gate logits.
std::vector<float> output_of(const std::string& spec, const NsaCase& c) {
  std::vector<float> o(static_cast<std::size_t>(4 * c.problem.q_len * 5));
  AttentionInputs inputs = c.inputs();
  inputs.side.clear();
  make_method(spec)->attend(c.problem, inputs, {mutable_view_of(o.data(), DType::f32, {1, 4, c.problem.q_len, 5}), {}},
                            {});
  return o;
}

void expect_near(const std::vector<float>& a, const std::vector<float>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (std::size_t i = 0; i < a.size(); ++i) ASSERT_NEAR(a[i], b[i], 1e-5) << i;
}

TEST(Nsa, AllBlocksThroughTheSelectedGateAreDense) {
  NsaSettings settings = only(1);
  settings.top_k = 1000;
  const NsaCase c(settings, 50, 77);
  expect_near(output_of(settings.spec(), c), output_of("dense", c));
}

TEST(Nsa, TheWindowGateAloneIsSlidingWindow) {
  const NsaSettings settings = only(2);
  const NsaCase c(settings, 50, 77);
  expect_near(output_of(settings.spec(), c), output_of("window:left=5,right=0", c));
}

TEST(Nsa, FewerKeysThanABlockGiveNoCompressedOutput) {
  NsaSettings settings = only(0);
  const NsaCase c(settings, 7, 7);
  for (const float x : output_of(settings.spec(), c)) EXPECT_EQ(x, 0.0F);
  settings = NsaSettings{};
  const NsaCase gated(settings, 7, 7);
  for (const float x : output_of(settings.spec(), gated)) EXPECT_TRUE(std::isfinite(x));
  for (const auto& [name, values] : gradients_of(gated, settings, true).values) {
    for (const float x : values) ASSERT_TRUE(std::isfinite(x)) << name;
  }
}

TEST(Nsa, RowsBeforeTheFirstTokenHaveNoCompressedOutput) {
  const NsaSettings settings = only(0);
  const NsaCase c(settings, 40, 40);
  const auto o = output_of(settings.spec(), c);
  for (std::size_t head = 0; head < 4; ++head) {
    for (std::size_t n = 0; n < 40; ++n) {
      for (std::size_t d = 0; d < 5; ++d) EXPECT_EQ(o[(head * 40 + n) * 5 + d] == 0.0F, n < 7) << n;
    }
  }
}

TEST(Nsa, HeadsOfAGroupChooseTheSameBlocks) {
  const NsaSettings settings;
  const NsaCase c(settings, 60, 60);
  const Plan plan = make_method(settings.spec())->plan(c.problem, c.inputs(), {});
  EXPECT_EQ(plan.plan_heads, 2);
  const auto mask = dense_mask(plan);
  const auto head = [&](std::int64_t h) {
    return std::vector<std::uint8_t>(mask.begin() + h * 3600, mask.begin() + (h + 1) * 3600);
  };
  EXPECT_EQ(head(0), head(1));
  EXPECT_EQ(head(2), head(3));
  EXPECT_NE(head(0), head(2));
}

TEST(Nsa, DecodingGivesTheLastRowOfThePrefill) {
  const NsaSettings settings = all_settings()[2];
  const NsaCase c(settings, 61, 61);
  std::vector<float> o(4 * 61 * 5);
  const auto method = make_method(settings.spec());
  method->attend(c.problem, c.inputs(), {mutable_view_of(o.data(), DType::f32, {1, 4, 61, 5}), {}}, {});
  Problem step = c.problem;
  step.q_len = 1;
  AttentionInputs inputs = c.inputs();
  const auto last = [](TensorView view) {
    view.data = view.row(0, 0, 60);
    view.shape[2] = 1;
    return view;
  };
  inputs.q = last(inputs.q);
  for (SideTensor& side : inputs.side) {
    if (side.name == "gate_logits") side.view = last(side.view);
  }
  std::vector<float> one(4 * 5);
  method->attend(step, inputs, {mutable_view_of(one.data(), DType::f32, {1, 4, 1, 5}), {}}, {});
  for (std::size_t h = 0; h < 4; ++h) {
    for (std::size_t d = 0; d < 5; ++d) EXPECT_NEAR(one[h * 5 + d], o[(h * 61 + 60) * 5 + d], 1e-5);
  }
}

/// Chunk by chunk with a state, as a session runs it, gives the rows of the whole; keys that are compressed already are
/// not read again for it.
TEST(Nsa, StateKeepsCompressedTokens) {
  const NsaSettings settings = all_settings()[2];
  NsaCase c(settings, 61, 61);
  const auto method = make_method(settings.spec());
  std::vector<float> whole(4 * 61 * 5);
  method->attend(c.problem, c.inputs(), {mutable_view_of(whole.data(), DType::f32, {1, 4, 61, 5}), {}}, {});
  const auto state = method->new_state();
  PlanContext context;
  context.state = state.get();
  for (const auto& [begin, end] : {std::pair{0, 30}, std::pair{30, 31}, std::pair{31, 48}, std::pair{48, 61}}) {
    Problem part = c.problem;
    part.q_len = end - begin;
    part.kv_len = end;
    AttentionInputs inputs = c.inputs();
    const auto cut = [](TensorView& view, std::int64_t first, std::int64_t last) {
      view.data = view.row(0, 0, first);
      view.shape[2] = last - first;
    };
    cut(inputs.q, begin, end);
    cut(inputs.k, 0, end);
    cut(inputs.v, 0, end);
    for (SideTensor& side : inputs.side) {
      if (side.name == "gate_logits") cut(side.view, begin, end);
      if (side.name.ends_with("_compress")) cut(side.view, 0, end);
    }
    std::vector<float> o(static_cast<std::size_t>(4 * part.q_len * 5));
    method->attend(part, inputs, {mutable_view_of(o.data(), DType::f32, {1, 4, part.q_len, 5}), {}}, context);
    for (std::int64_t h = 0; h < 4; ++h) {
      for (std::int64_t i = 0; i < part.q_len * 5; ++i) {
        ASSERT_NEAR(o[static_cast<std::size_t>(h * part.q_len * 5 + i)],
                    whole[static_cast<std::size_t>((h * 61 + begin) * 5 + i)], 1e-5);
      }
    }
    // Spoil what the finished tokens were made of; the next one starts at the stride after them.
    const std::int64_t tokens = end < 8 ? 0 : (end - 8) / 4 + 1;
    for (const auto& [name, dim] : {std::pair{"k_compress", 6}, std::pair{"v_compress", 5}}) {
      auto& values = c.tensors.at(name).values;
      for (std::int64_t h = 0; h < 2; ++h) {
        std::fill_n(values.begin() + h * 61 * dim, tokens * 4 * dim, std::nanf(""));
      }
    }
  }
}

/// A pass that failed leaves compressed tokens of keys that never came: the next pass makes them anew.
TEST(Nsa, StateForgetsAPassThatFailed) {
  const NsaSettings settings = all_settings()[2];
  const NsaCase c(settings, 61, 61);
  NsaCase failed(settings, 61, 61, 7);
  const auto method = make_method(settings.spec());
  const auto state = method->new_state();
  PlanContext context;
  context.state = state.get();
  const auto attend_rows = [&](const NsaCase& from, std::int64_t begin, std::int64_t end) {
    Problem part = from.problem;
    part.q_len = end - begin;
    part.kv_len = end;
    AttentionInputs inputs = from.inputs();
    const auto cut = [](TensorView& view, std::int64_t first, std::int64_t last) {
      view.data = view.row(0, 0, first);
      view.shape[2] = last - first;
    };
    cut(inputs.q, begin, end);
    cut(inputs.k, 0, end);
    cut(inputs.v, 0, end);
    for (SideTensor& side : inputs.side) {
      if (side.name == "gate_logits") cut(side.view, begin, end);
      if (side.name.ends_with("_compress")) cut(side.view, 0, end);
    }
    std::vector<float> o(static_cast<std::size_t>(4 * part.q_len * 5));
    method->attend(part, inputs, {mutable_view_of(o.data(), DType::f32, {1, 4, part.q_len, 5}), {}}, context);
    return o;
  };
  attend_rows(c, 0, 21);
  attend_rows(failed, 21, 61);
  const auto repeated = attend_rows(c, 21, 61);
  std::vector<float> whole(4 * 61 * 5);
  method->attend(c.problem, c.inputs(), {mutable_view_of(whole.data(), DType::f32, {1, 4, 61, 5}), {}}, {});
  for (std::int64_t h = 0; h < 4; ++h) {
    for (std::int64_t i = 0; i < 40 * 5; ++i) {
      ASSERT_NEAR(repeated[static_cast<std::size_t>(h * 40 * 5 + i)],
                  whole[static_cast<std::size_t>((h * 61 + 21) * 5 + i)], 1e-5);
    }
  }
}

class NsaShapes : public testing::TestWithParam<CaseShape> {};

TEST_P(NsaShapes, PlansHold) {
  const AttentionCase input(GetParam());
  test::expect_plans_hold(*make_method("nsa:length=8,stride=4,block_size=16,top_k=3,window=20"), input);
  test::expect_full_budget_is_dense(*make_method("nsa:length=8,stride=4,block_size=16,top_k=1000"), input);
}

TEST_P(NsaShapes, RunsOnEveryKindOfInput) {
  const AttentionCase input(GetParam());
  const Problem& problem = input.problem;
  const std::int64_t batch = problem.variable_length() ? 1 : problem.batch;
  const std::array<std::int64_t, 4> shape{batch, problem.q_heads, problem.q_len, problem.value_dim};
  std::vector<float> o(static_cast<std::size_t>(shape[0] * shape[1] * shape[2] * shape[3]), 99.0F);
  std::vector<float> lse(static_cast<std::size_t>(shape[0] * shape[1] * shape[2]), 99.0F);
  make_method("nsa:length=8,stride=4,block_size=16,top_k=3,window=20")
      ->attend(problem, input.inputs, {mutable_view_of(o.data(), DType::f32, shape), lse}, {});
  for (const float x : o) ASSERT_LT(std::fabs(x), 20.0F);
  for (const float x : lse) ASSERT_NE(x, 99.0F);
}

INSTANTIATE_TEST_SUITE_P(Shapes, NsaShapes, testing::ValuesIn(test::all_shapes()),
                         [](const auto& shape) { return shape.param.name; });

TEST(Nsa, RefusesWhatDoesNotFit) {
  const NsaSettings settings;
  const NsaCase c(settings, 20, 37);
  const auto refuses = [&](const std::string& spec, const AttentionInputs& inputs) {
    EXPECT_THROW(make_method(spec)->plan(c.problem, inputs, {}), Error) << spec;
  };
  EXPECT_NO_THROW(make_method(settings.spec())->plan(c.problem, c.inputs(), {}));
  refuses("nsa:length=10,stride=4", c.inputs());
  refuses("nsa:block_size=10,stride=4,length=8", c.inputs());
  refuses("nsa:compress=pool", c.inputs());
  refuses("nsa:compress=linear", c.inputs());
  refuses("nsa:compress=mlp", c.inputs());
  AttentionInputs inputs = c.inputs();
  inputs.side[0].view.shape[3] = 2;  // gate_logits
  refuses(settings.spec(), inputs);
  inputs = c.inputs();
  inputs.side.push_back({"k_window", inputs.k});
  refuses(settings.spec(), inputs);
  inputs = c.inputs();
  inputs.modifiers.softcap = 3;
  refuses(settings.spec(), inputs);

  NsaGradients gradients(c);
  SavedForward saved;
  saved.o = saved.d_o = c.tensors.at("d_o").view();
  const auto method = make_method(settings.spec());
  const std::vector<float> d_lse(80, 1.0F);
  saved.d_lse = d_lse;
  EXPECT_THROW(method->backward(c.problem, c.inputs(), saved, gradients.views, {}), Error);
  saved.d_lse = {};
  gradients.views.side.push_back({"pool_k", gradients.views.d_k});
  EXPECT_THROW(method->backward(c.problem, c.inputs(), saved, gradients.views, {}), Error);
  EXPECT_THROW(make_method("oracle-topk")->backward(c.problem, c.inputs(), saved, {}, {}), Error);
}

TEST(Nsa, DeclaresEverySideInputThatItReads) {
  const MethodInfo& info = find_method("nsa").info;
  std::set<std::string> declared;
  for (const SideInputInfo& side : info.side) {
    EXPECT_FALSE(side.required) << side.name;
    EXPECT_TRUE(declared.insert(side.name).second) << side.name;
  }
  std::set<std::string> read;
  for (const NsaSettings& settings : all_settings()) {
    for (const SideTensor& side : NsaCase(settings, 20, 37).inputs().side) read.insert(side.name);
  }
  for (const std::string& name : read) EXPECT_TRUE(declared.contains(name)) << name;
  EXPECT_TRUE(read.contains("gate_logits"));
  const auto& gates = *std::find_if(info.side.begin(), info.side.end(),
                                    [](const SideInputInfo& side) { return side.name == "gate_logits"; });
  EXPECT_EQ(shape_text(gates), "[B, Hq, Nq, w]");
}

}  // namespace
}  // namespace tessera
