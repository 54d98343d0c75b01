// Gated DeltaNet and the steps of its layer.
#include "methods/linear/layer_gradient.h"
#include "methods/linear/linear_case.h"
#include "methods/recurrent_attention.h"

namespace tessera {
namespace {

using test::CaseShape;
using test::expect_near;
using test::LinearCase;
using test::message_of;
using testing::HasSubstr;

/// Decays and betas of side inputs with `heads` heads.
LinearCase::Rule rule_of(const LinearCase& input, std::int64_t heads) {
  const std::int64_t shared = input.problem().q_heads / heads;
  return {.decay = [&input, heads, shared](std::int64_t s, std::int64_t h, std::int64_t t,
                                           std::int64_t) { return input.g[input.at(s, heads, h / shared, t)]; },
          .beta = [&input, heads, shared](std::int64_t s, std::int64_t h,
                                          std::int64_t t) { return input.beta[input.at(s, heads, h / shared, t)]; },
          .scale = 0.25,
          .normalise = true};
}

TEST(GatedDeltaNet, IsTheRecurrenceOnEveryShape) {
  for (const CaseShape& shape : test::recurrent_shapes()) {
    for (const std::int64_t heads : {shape.q_heads, shape.kv_heads}) {
      LinearCase input(shape);
      input.add_gates(heads, 0, -1, 0);
      const auto method = make_method("gated-deltanet");
      const auto expected = input.expected(rule_of(input, heads));
      expect_near(input.attend(*method), expected, 5e-5, shape.name);
      expect_near(input.attend(*method, nullptr, KernelKind::reference), expected, 1e-5, shape.name);
    }
  }
}

TEST(GatedDeltaNet, GateOfTheLayer) {
  LinearCase input({.name = "gate", .q_heads = 2, .kv_heads = 2, .q_len = 70, .kv_len = 70});
  input.add_gates(2, 0, -3, 3);
  const std::vector<float> a_log{0.3F, -0.7F};
  const std::vector<float> bias{-1.0F, 0.4F};
  LinearCase::Rule rule = rule_of(input, 2);
  const auto softplus = [](double x) { return std::log(1 + std::exp(x)); };
  std::vector<double> raw(input.g.begin(), input.g.end());
  rule.decay = [&](std::int64_t s, std::int64_t h, std::int64_t t, std::int64_t) {
    return -softplus(raw[input.at(s, 2, h, t)]);
  };
  const auto method = make_method("gated-deltanet:gate=softplus");
  expect_near(input.attend(*method), input.expected(rule), 5e-5, "defaults");
  input.add("A_log", {2}, a_log);
  input.add("dt_bias", {2}, bias);
  rule.decay = [&](std::int64_t s, std::int64_t h, std::int64_t t, std::int64_t) {
    return -std::exp(a_log[h]) * softplus(raw[input.at(s, 2, h, t)] + bias[h]);
  };
  expect_near(input.attend(*method), input.expected(rule), 5e-5, "A_log and dt_bias");
}

TEST(GatedDeltaNet, WithoutGateItIsDeltaNet) {
  LinearCase input({.name = "deltanet", .q_len = 90, .kv_len = 90});
  input.add_gates(2, 0, -1, 0);
  LinearCase::Rule rule = rule_of(input, 2);
  rule.decay = [](std::int64_t, std::int64_t, std::int64_t, std::int64_t) { return 0.0; };
  expect_near(input.attend(*make_method("gated-deltanet:gate=none")), input.expected(rule), 5e-5, "DeltaNet");
}

TEST(GatedDeltaNet, BetaGates) {
  LinearCase input({.name = "beta", .q_len = 60, .kv_len = 60});
  input.add_gates(2, 0, -1, 0);
  for (const auto& [name, factor] :
       std::vector<std::pair<std::string, double>>{{"sigmoid", 1.0}, {"twice-sigmoid", 2.0}}) {
    LinearCase::Rule rule = rule_of(input, 2);
    rule.beta = [&input, factor = factor](std::int64_t s, std::int64_t h, std::int64_t t) {
      return factor / (1 + std::exp(-input.beta[input.at(s, 2, h, t)]));
    };
    expect_near(input.attend(*make_method("gated-deltanet:beta_gate=" + name)), input.expected(rule), 1e-4, name);
  }
}

TEST(GatedDeltaNet, LengthsOfKeysDoNotMatterUnlessAsked) {
  LinearCase input({.name = "norm", .q_len = 40, .kv_len = 40});
  input.add_gates(2, 0, -1, 0);
  LinearCase::Rule rule = rule_of(input, 2);
  rule.normalise = false;
  rule.beta = [](std::int64_t, std::int64_t, std::int64_t) { return 0.05; };
  std::vector<float> weak(2 * 40, 0.05F);
  input.input.inputs.side.pop_back();
  input.add("beta", {1, 2, 40}, weak);
  expect_near(input.attend(*make_method("gated-deltanet:l2norm=false")), input.expected(rule), 1e-4, "raw");
}

TEST(GatedDeltaNet, ConvolutionsRunOverTheTokens) {
  LinearCase input({.name = "conv", .q_heads = 2, .kv_heads = 1, .q_len = 50, .kv_len = 50});
  input.add_gates(2, 0, -1, 0);
  LinearCase by_hand({.name = "conv", .q_heads = 2, .kv_heads = 1, .q_len = 50, .kv_len = 50});
  by_hand.input.inputs.side = input.input.inputs.side;
  by_hand.g = input.g;
  by_hand.beta = input.beta;
  const std::vector<float> wq = input.draw(2 * 4 * 16, -1, 1);
  const std::vector<float> wk = input.draw(3 * 16, -1, 1);
  const std::vector<float> wv = input.draw(2 * 8, -1, 1);
  input.add("conv_q", {2, 4, 16}, wq);
  input.add("conv_k", {1, 3, 16}, wk);
  input.add("conv_v", {1, 2, 8}, wv);
  const auto convolve = [](std::int64_t t, std::int64_t width, const std::function<float(std::int64_t)>& x,
                           const std::function<float(std::int64_t)>& w) {
    double sum = 0;
    for (std::int64_t m = 0; m < width; ++m) {
      if (t - width + 1 + m >= 0) sum += w(m) * x(t - width + 1 + m);
    }
    return static_cast<float>(sum / (1 + std::exp(-sum)));
  };
  std::vector<float> values(50 * 8);
  for (std::int64_t t = 0; t < 50; ++t) {
    for (std::int64_t d = 0; d < 16; ++d) {
      for (std::int64_t h = 0; h < 2; ++h) {
        by_hand.input.set_q(0, h, t, d,
                            convolve(
                                t, 4, [&](std::int64_t n) { return input.input.q(0, h, n, d); },
                                [&](std::int64_t m) { return wq[(h * 4 + m) * 16 + d]; }));
      }
      by_hand.input.set_k(0, 0, t, d,
                          convolve(
                              t, 3, [&](std::int64_t n) { return input.input.k(0, 0, n, d); },
                              [&](std::int64_t m) { return wk[m * 16 + d]; }));
    }
    for (std::int64_t d = 0; d < 8; ++d) {
      values[t * 8 + d] = convolve(
          t, 2, [&](std::int64_t n) { return input.v(0, 0, n, d); }, [&](std::int64_t m) { return wv[m * 8 + d]; });
    }
  }
  by_hand.input.inputs.v = view_of(values.data(), DType::f32, {1, 1, 50, 8});
  const auto method = make_method("gated-deltanet");
  expect_near(input.attend(*method), by_hand.attend(*method), 2e-5, "convolutions");
}

TEST(GatedDeltaNet, ChunksAndDecodeEqualOneShot) {
  for (const CaseShape& shape :
       {CaseShape{.name = "plain", .batch = 2, .q_len = 147, .kv_len = 147},
        CaseShape{.name = "paged", .q_heads = 4, .kv_heads = 2, .q_len = 147, .kv_len = 147, .page_size = 16}}) {
    LinearCase input(shape);
    input.add_gates(shape.q_heads, 0, -1, 0);
    test::expect_chunks_and_decode_equal_one_shot(*make_method("gated-deltanet"), input);
    // The rows before a chunk that a convolution needs are in the state.
    input.add("conv_q", {shape.q_heads, 4, 16}, input.draw(shape.q_heads * 4 * 16, -1, 1));
    input.add("conv_k", {shape.kv_heads, 4, 16}, input.draw(shape.kv_heads * 4 * 16, -1, 1));
    input.add("conv_v", {shape.kv_heads, 4, 8}, input.draw(shape.kv_heads * 4 * 8, -1, 1));
    input.add("output_gate", {shape.batch, shape.q_heads, 147, 8},
              input.draw(shape.batch * shape.q_heads * 147 * 8, -1, 1));
    test::expect_chunks_and_decode_equal_one_shot(*make_method("gated-deltanet:norm=head"), input);
  }
}

TEST(GatedDeltaNet, VariableLengthBatchesContinue) {
  // Sequences of a batch at different places: each state knows how many tokens it has seen.
  const auto method = make_method("gated-deltanet");
  LinearCase whole({.name = "whole", .q_lens = {60, 90}, .kv_lens = {60, 90}});
  whole.add_gates(2, 0, -1, 0);
  const auto expected = whole.attend(*method);
  const auto state = method->new_state();
  // First 50 and 90 of them, then the last 10 of the first and none of the second.
  Problem first = whole.problem();
  first.cu_seqlens_q = first.cu_seqlens_k = {0, 50, 140};
  first.q_len = first.kv_len = 140;
  AttentionInputs inputs = whole.input.inputs;
  const auto without = [](const TensorView& view, std::size_t axis, std::vector<float>& storage) {
    std::vector<float> kept;
    std::array<std::int64_t, 4> shape = view.shape;
    shape.at(axis) = 140;
    for (std::int64_t h = 0; h < view.shape[1]; ++h) {
      for (std::int64_t n = 0; n < view.shape[2]; ++n) {
        for (std::int64_t d = 0; d < view.shape[3]; ++d) {
          const std::int64_t token = axis == 2 ? n : d;
          if (token < 50 || token >= 60) kept.push_back(load_as_float(view.row(0, h, n), view.dtype, d));
        }
      }
    }
    storage = kept;
    return view_of(storage.data(), DType::f32, shape);
  };
  std::array<std::vector<float>, 5> storage;
  inputs.q = without(inputs.q, 2, storage[0]);
  inputs.k = without(inputs.k, 2, storage[1]);
  inputs.v = without(inputs.v, 2, storage[2]);
  inputs.side[0].view = without(inputs.side[0].view, 3, storage[3]);
  inputs.side[1].view = without(inputs.side[1].view, 3, storage[4]);
  std::vector<float> o(2 * 140 * 8);
  PlanContext context;
  context.state = state.get();
  method->attend(first, inputs, {mutable_view_of(o.data(), DType::f32, {1, 2, 140, 8}), {}}, context);

  Problem second = whole.problem();
  second.cu_seqlens_q = {0, 10, 10};
  second.q_len = 10;
  inputs = whole.input.inputs;
  inputs.q.data = inputs.q.row(0, 0, 50);
  inputs.q.shape[2] = 10;
  std::vector<float> last(2 * 10 * 8);
  method->attend(second, inputs, {mutable_view_of(last.data(), DType::f32, {1, 2, 10, 8}), {}}, context);
  for (std::int64_t h = 0; h < 2; ++h) {
    for (std::int64_t n = 0; n < 10; ++n)
      ASSERT_NEAR(last[(h * 10 + n) * 8 + 1], expected[(h * 150 + 50 + n) * 8 + 1], 1e-4);
  }
}

TEST(GatedDeltaNet, NormWeightsAndSiluGate) {
  LinearCase input({.name = "output", .q_len = 30, .kv_len = 30});
  input.add_gates(2, 0, -1, 0);
  const auto plain = input.attend(*make_method("gated-deltanet"));
  const std::vector<float> weights = input.draw(8, 0.5F, 2);
  const std::vector<float> gates = input.draw(2 * 30 * 8, -2, 2);
  input.add("norm_weight", {8}, weights);
  input.add("output_gate", {1, 2, 30, 8}, gates);
  std::vector<double> expected;
  for (std::size_t row = 0; row < plain.size(); row += 8) {
    double squares = 0;
    for (std::size_t d = 0; d < 8; ++d) squares += std::pow(plain[row + d], 2);
    for (std::size_t d = 0; d < 8; ++d) {
      const double gate = gates[row + d] / (1 + std::exp(-static_cast<double>(gates[row + d])));
      expected.push_back(plain[row + d] / std::sqrt(squares / 8 + 1e-5) * weights[d] * gate);
    }
  }
  expect_near(input.attend(*make_method("gated-deltanet:norm=head")), expected, 1e-4, "norm and gate");
}

TEST(GatedDeltaNet, SideInputsAreNeededAndChecked) {
  const auto message = [&](const std::function<void(LinearCase&)>& add, const std::string& spec = "gated-deltanet") {
    LinearCase input({.name = "side", .q_heads = 4, .kv_heads = 2, .q_len = 20, .kv_len = 30});
    add(input);
    return message_of([&] { input.attend(*make_method(spec)); });
  };
  const std::vector<float> zeros(4 * 30 * 16, 0.0F);
  const auto some = [&](std::int64_t count) { return std::vector<float>(zeros.begin(), zeros.begin() + count); };
  EXPECT_THAT(message([&](LinearCase& c) {
                c.add("g", {1, 4, 30}, some(120));
              }),
              HasSubstr("side input 'beta' is missing"));
  EXPECT_THAT(message([&](LinearCase& c) {
                c.add("beta", {1, 4, 30}, some(120));
              }),
              HasSubstr("side input 'g' is missing"));
  EXPECT_EQ(message(
                [&](LinearCase& c) {
                  c.add("beta", {1, 4, 30}, some(120));
                },
                "gated-deltanet:gate=none"),
            "no error");
  EXPECT_EQ(message(
                [&](LinearCase& c) {
                  c.add("beta", {1, 4, 30, 1}, some(120));
                },
                "gated-deltanet:gate=none"),
            "no error");
  for (const std::vector<std::int64_t>& shape :
       std::vector<std::vector<std::int64_t>>{{1, 3, 30}, {1, 4, 20}, {2, 2, 30}, {120}}) {
    const auto add = [&](LinearCase& c) {
      std::int64_t size = 1;
      for (const std::int64_t n : shape) size *= n;
      c.add("beta", shape, some(size));
    };
    EXPECT_THAT(message(add), HasSubstr("side input 'beta' has shape")) << testing::PrintToString(shape);
  }
  const auto positive = [&](LinearCase& c) {
    c.add("beta", {1, 4, 30}, some(120));
    c.add("g", {1, 4, 30}, std::vector<float>(120, 0.5F));
  };
  EXPECT_THAT(message(positive), HasSubstr("decay of sequence 0, head 0, token 0, channel 0 is 0.5"));
  const auto queries = [&](LinearCase& c) {
    c.add("beta", {1, 4, 30}, some(120));
    c.add("conv_q", {4, 4, 16}, some(256));
  };
  EXPECT_THAT(message(queries, "gated-deltanet:gate=none"), HasSubstr("conv_q needs the query of every token"));
}

TEST(GatedDeltaNet, GradientsMatchCentralDifferences) {
  test::LayerSettings plain{.spec = "gated-deltanet"};
  plain.decay = "log";
  plain.beta = "none";
  plain.normalise = true;
  plain.scale = 1 / std::sqrt(6.0);
  test::LayerGradient(plain).check();
  test::LayerSettings s = plain;
  s.spec = "gated-deltanet:gate=softplus,beta_gate=sigmoid,norm=head,chunk=16";
  s.decay = "softplus";
  s.beta = "sigmoid";
  s.norm = "head";
  s.curve = "silu";
  s.convolution = 3;
  s.q_heads = 4;
  s.kv_heads = s.side_heads = 2;
  s.tokens = s.queries = 35;
  s.initial_state = true;
  test::LayerGradient(s, 2).check();
  s = plain;
  s.spec = "gated-deltanet:gate=none,beta_gate=twice-sigmoid,norm=full";
  s.decay = "none";
  s.beta = "twice-sigmoid";
  s.norm = "full";
  s.curve = "silu";
  s.q_lens = {12, 3};
  s.kv_lens = {12, 20};
  test::LayerGradient(s, 3).check();
  s = plain;
  s.spec = "gated-deltanet:l2norm=false";
  s.normalise = false;
  s.head_dim = 3;
  s.scale = 1 / std::sqrt(3.0);
  s.tokens = 9;
  s.queries = 2;
  test::LayerGradient(s, 4).check();
}

TEST(GatedDeltaNet, GradientsOfASideInputThatIsNotReadAreZero) {
  test::LayerSettings s{.spec = "gated-deltanet:gate=none"};
  s.decay = "log";
  s.beta = "none";
  const auto gradients = test::LayerGradient(s).gradients(KernelKind::automatic);
  for (const float x : gradients.at("g")) EXPECT_EQ(x, 0);
}

TEST(GatedDeltaNet, TheInitialStateStandsForEarlierTokens) {
  // State after the first tokens, given as initial_state to a call on the rest, continues it.
  LinearCase input({.name = "continue", .q_heads = 2, .kv_heads = 1, .q_len = 60, .kv_len = 60});
  input.add_gates(2, 0, -1, 0);
  const auto method = make_method("gated-deltanet");
  const std::vector<float> whole = input.attend(*method);
  const std::unique_ptr<MethodState> state = method->new_state();
  const test::Part first = test::part_of(input, 25, 25, false);
  std::vector<float> o(2 * 25 * 8);
  method->attend(first.problem, first.inputs, {mutable_view_of(o.data(), DType::f32, {1, 2, 25, 8}), {}},
                 {.state = state.get(), .run = {}});
  const auto& layer = dynamic_cast<const RecurrentMethodState&>(*state).layers.at(0);
  const std::vector<float> kept(layer.states.layer(0).begin(), layer.states.layer(0).end());
  test::Part rest = test::part_of(input, 60, 35, true);
  rest.inputs.side.push_back({"initial_state", view_of(kept.data(), DType::f32, {1, 2, 16, 8})});
  std::vector<float> later(2 * 35 * 8);
  const AttentionOutputs outputs{mutable_view_of(later.data(), DType::f32, {1, 2, 35, 8}), {}};
  method->attend(rest.problem, rest.inputs, outputs, {});
  for (std::int64_t h = 0; h < 2; ++h) {
    for (std::int64_t i = 0; i < 35 * 8; ++i) {
      ASSERT_NEAR(later[h * 35 * 8 + i], whole[(h * 60 + 25) * 8 + i], 1e-4) << i;
    }
  }
  // With a state that has seen tokens, another beginning is a contradiction; so is the gradient of a continued call.
  EXPECT_THAT(
      message_of([&] { method->attend(rest.problem, rest.inputs, outputs, {.state = state.get(), .run = {}}); }),
      HasSubstr("'initial_state' is given to a state that has seen 25 tokens"));
  rest.inputs.side.pop_back();
  SavedForward saved;
  saved.o = saved.d_o = outputs.o;
  EXPECT_THAT(
      message_of([&] { method->backward(rest.problem, rest.inputs, saved, {}, {.state = state.get(), .run = {}}); }),
      HasSubstr("has seen 25 tokens, but the call has 35"));
}

TEST(GatedDeltaNet, BackwardRefusesWhatDoesNotFit) {
  test::LayerSettings s{.spec = "gated-deltanet"};
  s.decay = "log";
  s.beta = "none";
  const test::LayerGradient layer(s);
  const auto method = make_method(s.spec);
  SavedForward saved;
  saved.o = saved.d_o = layer.tensors.at("d_o").view();
  std::vector<float> memory(10000);
  const auto message = [&](const Gradients& gradients) {
    return message_of([&] { method->backward(layer.problem, layer.inputs(), saved, gradients, {}); });
  };
  Gradients gradients;
  gradients.side.push_back({"A_log", mutable_view_of(memory.data(), DType::f32, {1, 1, 1, 2})});
  EXPECT_THAT(message(gradients), HasSubstr("gradient of side input 'A_log' is wanted, which is not given"));
  gradients.side[0] = {"g", mutable_view_of(memory.data(), DType::f32, {1, 2, 39, 1})};
  EXPECT_THAT(message(gradients), HasSubstr("gradient of side input 'g' is f32 [1, 2, 39, 1]; expected"));
  gradients.side.clear();
  gradients.d_k = mutable_view_of(memory.data(), DType::f32, {1, 2, 40, 6});
  EXPECT_THAT(message(gradients), HasSubstr("d_k is f32 [1, 2, 40, 6]; expected f32, bf16 or f16 [1, 1, 40, 6]"));
  saved.d_o.shape[2] = 39;
  EXPECT_THAT(message({}), HasSubstr("d_o is f32 [1, 2, 39, 5]"));
}

}  // namespace
}  // namespace tessera
