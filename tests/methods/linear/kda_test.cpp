// Kimi Delta Attention.
#include "methods/linear/layer_gradient.h"
#include "methods/linear/linear_case.h"

namespace tessera {
namespace {

using test::CaseShape;
using test::expect_near;
using test::LinearCase;
using test::message_of;
using testing::HasSubstr;

LinearCase::Rule rule_of(const LinearCase& input) {
  const std::int64_t heads = input.problem().q_heads;
  return {.decay = [&input, heads](std::int64_t s, std::int64_t h, std::int64_t t,
                                   std::int64_t d) { return input.g[input.at(s, heads, h, t) * 16 + d]; },
          .beta = [&input, heads](std::int64_t s, std::int64_t h,
                                  std::int64_t t) { return input.beta[input.at(s, heads, h, t)]; },
          .scale = 0.25,
          .normalise = true};
}

TEST(Kda, IsTheRecurrenceOnEveryShape) {
  for (const CaseShape& shape : test::recurrent_shapes()) {
    LinearCase input(shape);
    input.add_gates(shape.q_heads, 16, -1, 0);
    const auto expected = input.expected(rule_of(input));
    for (const char* spec : {"kda", "kda:chunk=16", "kda:chunk=128"}) {
      expect_near(input.attend(*make_method(spec)), expected, 5e-5, shape.name);
    }
    expect_near(input.attend(*make_method("kda"), nullptr, KernelKind::reference), expected, 1e-5, shape.name);
  }
}

TEST(Kda, StrongDecaysStayFinite) {
  // -5 per token is what the bounded gate allows; exp of 64 such tokens is beyond float32.
  for (const float low : {-5.0F, -80.0F}) {
    LinearCase input({.name = "strong", .q_len = 130, .kv_len = 130});
    input.add_gates(2, 16, low, 0);
    expect_near(input.attend(*make_method("kda")), input.expected(rule_of(input)), 5e-5, "strong decays");
  }
}

TEST(Kda, GatesOfTheLayer) {
  LinearCase input({.name = "gate", .q_heads = 2, .kv_heads = 2, .q_len = 70, .kv_len = 70});
  input.add_gates(2, 16, -3, 3);
  const std::vector<float> a_log{0.3F, -0.7F};
  const std::vector<float> bias = input.draw(32, -1, 1);
  input.add("A_log", {2}, a_log);
  input.add("dt_bias", {2, 16}, bias);
  LinearCase::Rule rule = rule_of(input);
  const auto raw = [&](std::int64_t s, std::int64_t h, std::int64_t t, std::int64_t d) {
    return static_cast<double>(input.g[input.at(s, 2, h, t) * 16 + d]) + bias[h * 16 + d];
  };
  rule.decay = [&](std::int64_t s, std::int64_t h, std::int64_t t, std::int64_t d) {
    return -std::exp(a_log[h]) * std::log(1 + std::exp(raw(s, h, t, d)));
  };
  expect_near(input.attend(*make_method("kda:gate=softplus")), input.expected(rule), 5e-5, "softplus");
  for (const double bound : {-5.0, -2.0}) {
    rule.decay = [&](std::int64_t s, std::int64_t h, std::int64_t t, std::int64_t d) {
      return bound / (1 + std::exp(-std::exp(a_log[h]) * raw(s, h, t, d)));
    };
    expect_near(input.attend(*make_method("kda:gate=bounded,lower_bound=" + std::to_string(bound))),
                input.expected(rule), 5e-5, "bounded");
  }
}

TEST(Kda, OneDecayForAllChannelsIsGatedDeltaNet) {
  LinearCase input({.name = "equal", .q_len = 130, .kv_len = 130});
  input.add_gates(2, 0, -1, 0);
  const auto expected = input.attend(*make_method("gated-deltanet"));
  std::vector<float> channels;
  for (const float g : input.g) channels.insert(channels.end(), 16, g);
  LinearCase equal({.name = "equal", .q_len = 130, .kv_len = 130});
  equal.add("g", {1, 2, 130, 16}, channels);
  equal.add("beta", {1, 2, 130}, input.beta);
  expect_near(equal.attend(*make_method("kda")), expected, 5e-5, "equal channels");
}

TEST(Kda, RecallsWhatItStored) {
  // Orthonormal keys, beta 1, no decay: a query that equals a key reads the value last stored under it.
  LinearCase input({.name = "recall", .q_heads = 1, .q_len = 33, .kv_len = 33});
  for (std::int64_t n = 0; n < 33; ++n) {
    for (std::int64_t d = 0; d < 16; ++d) {
      input.input.set_k(0, 0, n, d, d == n % 16 ? 1.0F : 0.0F);
      input.input.set_q(0, 0, n, d, d == (n + 3) % 16 ? 1.0F : 0.0F);
    }
  }
  input.input.problem.scale = 1.0F;
  input.add("g", {1, 1, 33, 16}, std::vector<float>(33 * 16, 0.0F));
  input.add("beta", {1, 1, 33}, std::vector<float>(33, 1.0F));
  const auto o = input.attend(*make_method("kda"));
  for (std::int64_t n = 16; n < 33; ++n) {
    const std::int64_t stored = (n / 16) * 16 + (n + 3) % 16;
    for (std::int64_t d = 0; d < 8; ++d) {
      ASSERT_NEAR(o[n * 8 + d], input.v(0, 0, stored <= n ? stored : stored - 16, d), 1e-4) << n;
    }
  }
}

TEST(Kda, ChunksAndDecodeEqualOneShot) {
  for (const CaseShape& shape :
       {CaseShape{.name = "plain", .batch = 2, .q_len = 147, .kv_len = 147},
        CaseShape{.name = "paged", .q_heads = 4, .kv_heads = 2, .q_len = 147, .kv_len = 147, .page_size = 16}}) {
    LinearCase input(shape);
    input.add_gates(shape.q_heads, 16, -1, 0);
    test::expect_chunks_and_decode_equal_one_shot(*make_method("kda"), input);
    input.add("conv_k", {shape.kv_heads, 4, 16}, input.draw(shape.kv_heads * 4 * 16, -1, 1));
    test::expect_chunks_and_decode_equal_one_shot(*make_method("kda"), input);
  }
}

TEST(Kda, ThreadsDoNotMatter) {
  LinearCase input({.name = "threads", .q_heads = 1, .q_len = 1200, .kv_len = 1200});
  input.add_gates(1, 16, -1, 0);
  const auto method = make_method("kda");
  const auto one = input.attend(*method, nullptr, KernelKind::automatic, 0, 1, 1);
  EXPECT_EQ(input.attend(*method, nullptr, KernelKind::automatic, 0, 1, 4), one);
}

TEST(Kda, SideInputsAreNeededAndChecked) {
  LinearCase input({.name = "side", .q_len = 20, .kv_len = 20});
  const auto attend = [&] { input.attend(*make_method("kda")); };
  EXPECT_THAT(message_of(attend), HasSubstr("kda: side input 'beta' is missing"));
  input.add("beta", {1, 2, 20}, std::vector<float>(40));
  EXPECT_THAT(message_of(attend), HasSubstr("kda: side input 'g' is missing; expected a tensor [1, 2, 20, 16]"));
  input.add("g", {1, 2, 20, 8}, std::vector<float>(320));
  EXPECT_THAT(message_of(attend), HasSubstr("'g' has shape [1, 2, 20, 8]; expected [1, 2 or 1, 20, 16]"));
  EXPECT_THAT(message_of([] { make_method("kda:chunk=72"); }), HasSubstr("chunk=72"));
}

TEST(Kda, DeclaresItsSideInputs) {
  const MethodInfo& info = find_method("kda").info;
  Problem problem;
  problem.batch = 2;
  problem.q_heads = 4;
  problem.kv_heads = 2;
  problem.q_len = problem.kv_len = 7;
  problem.head_dim = 16;
  problem.value_dim = 8;
  const auto find = [&](const std::string& name) {
    for (const SideInputInfo& side : info.side) {
      if (side.name == name) return side;
    }
    ADD_FAILURE() << name;
    return SideInputInfo{};
  };
  EXPECT_EQ(shape_text(find("g")), "[B, Hq, N, D]");
  EXPECT_EQ(side_shape(find("g"), problem), (std::array<std::int64_t, 4>{2, 4, 7, 16}));
  EXPECT_EQ(side_shape(find("beta"), problem), (std::array<std::int64_t, 4>{1, 2, 4, 7}));
  EXPECT_EQ(side_shape(find("dt_bias"), problem), (std::array<std::int64_t, 4>{1, 1, 4, 16}));
  EXPECT_TRUE(find("g").required);
  EXPECT_FALSE(find("conv_q").required);
  EXPECT_THAT(methods_markdown(), HasSubstr("| `g` | [B, Hq, N, D] | yes |"));
}

test::LayerSettings gradient_settings() {
  test::LayerSettings s{.spec = "kda"};
  s.decay = "log";
  s.beta = "none";
  s.channels = s.normalise = true;
  s.scale = 1 / std::sqrt(6.0);
  return s;
}

TEST(Kda, GradientsMatchCentralDifferences) {
  test::LayerGradient(gradient_settings()).check();
  test::LayerSettings s = gradient_settings();
  s.spec = "kda:chunk=16,norm=head";
  s.norm = "head";
  s.curve = "sigmoid";
  s.convolution = 4;
  s.initial_state = true;
  test::LayerGradient(s, 2).check();
  s = gradient_settings();
  s.spec = "kda:gate=softplus,beta_gate=sigmoid";
  s.decay = "softplus";
  s.beta = "sigmoid";
  s.q_heads = s.side_heads = 4;
  s.kv_heads = 2;
  s.tokens = 67;
  s.queries = 19;
  s.initial_state = true;
  test::LayerGradient(s, 3).check();
  s = gradient_settings();
  s.spec = "kda:gate=bounded,beta_gate=twice-sigmoid,l2norm=true";
  s.decay = "bounded";
  s.beta = "twice-sigmoid";
  s.q_heads = 4;
  s.kv_heads = s.side_heads = 2;
  s.batch = 2;
  s.tokens = s.queries = 17;
  test::LayerGradient(s, 4).check();
}

TEST(Kda, GradientsOfVariableLengths) {
  test::LayerSettings s = gradient_settings();
  s.q_lens = {20, 0, 1, 18};
  s.kv_lens = {33, 5, 1, 18};
  s.initial_state = true;
  test::LayerGradient(s, 5).check();
  s.tokens = 1;
  s.queries = 1;
  s.q_lens = s.kv_lens = {};
  test::LayerGradient(s, 6).check();
}

TEST(Kda, GradientsDoNotDependOnThreads) {
  test::LayerSettings s = gradient_settings();
  s.spec = "kda:gate=softplus,norm=full";
  s.decay = "softplus";
  s.norm = "full";
  s.curve = "sigmoid";
  s.convolution = 2;
  s.tokens = s.queries = 200;
  const test::LayerGradient layer(s);
  EXPECT_EQ(layer.gradients(KernelKind::automatic, 1), layer.gradients(KernelKind::automatic, 3));
}

}  // namespace
}  // namespace tessera
