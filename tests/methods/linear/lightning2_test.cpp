// Lightning Attention-2 and the decays it offers.
#include "methods/linear/layer_gradient.h"
#include "methods/linear/linear_case.h"

namespace tessera {
namespace {

using test::CaseShape;
using test::expect_near;
using test::LinearCase;
using test::message_of;
using testing::HasSubstr;

double no_delta(std::int64_t, std::int64_t, std::int64_t) {
  return -1;
}

/// Constant log decays per query head.
LinearCase::Rule rule_of(const std::vector<double>& decays) {
  return {.decay = [decays](std::int64_t, std::int64_t h, std::int64_t, std::int64_t) { return decays[h]; },
          .beta = no_delta};
}

TEST(Lightning2, IsTheRecurrenceOnEveryShape) {
  for (const CaseShape& shape : test::recurrent_shapes()) {
    const LinearCase input(shape);
    std::vector<double> slopes;
    for (std::int64_t h = 0; h < shape.q_heads; ++h) {
      slopes.push_back(-std::exp2(-8.0 * static_cast<double>(h + 1) / static_cast<double>(shape.q_heads)) * (1 + 1e-5));
    }
    const auto method = make_method("lightning2");
    expect_near(input.attend(*method), input.expected(rule_of(slopes)), 2e-5, shape.name);
    expect_near(input.attend(*method, nullptr, KernelKind::reference), input.expected(rule_of(slopes)), 1e-5,
                shape.name);
  }
}

TEST(Lightning2, DecaySchedules) {
  LinearCase input({.name = "heads", .q_heads = 3, .kv_heads = 3, .q_len = 60, .kv_len = 60});
  input.add("lambda", {3}, {0.9F, 1.0F, 0.25F});
  const auto check = [&](const std::string& decay, const std::vector<double>& decays) {
    const auto method = make_method("lightning2:decay=" + decay);
    expect_near(input.attend(*method, nullptr, KernelKind::automatic, 2, 5), input.expected(rule_of(decays)), 2e-5,
                decay);
  };
  // Three heads: the two slopes of two heads, then the first of four.
  const std::vector<double> slopes{1.0 / 16, 1.0 / 256, 0.25};
  const double factor = 1 - 2.0 / 4 + 1e-5;
  check("alibi", {-slopes[0] * factor, -slopes[1] * factor, -slopes[2] * factor});
  check("alibi-constant", {-slopes[0], -slopes[1], -slopes[2]});
  check("linear", {0, -8.0 / 3 * (1 - 2.0 / 5), -16.0 / 3 * (1 - 2.0 / 5)});
  check("retnet", {std::log(1 - 1.0 / 32), std::log(1 - 1.0 / 64), std::log(1 - 1.0 / 128)});
  check("none", {0, 0, 0});
  check("given", {std::log(0.9F), 0, std::log(0.25)});
}

TEST(Lightning2, LaterLayersForgetLess) {
  const LinearCase input({.name = "layers", .q_heads = 1, .q_len = 40, .kv_len = 40});
  const auto method = make_method("lightning2");
  const auto last = input.attend(*method, nullptr, KernelKind::automatic, 7, 8);
  const double kept = -1e-5 * std::exp2(-8.0);  // the 1e-5 keeps lambda from 1
  expect_near(last, input.expected(rule_of({kept})), 2e-5, "last layer");
}

TEST(Lightning2, BlockScheduleAndThreadsDoNotMatter) {
  const LinearCase input({.name = "long", .q_heads = 2, .kv_heads = 1, .q_len = 1500, .kv_len = 1500});
  const auto expected = input.attend(*make_method("lightning2"));
  for (const char* spec : {"lightning2:block=16", "lightning2:block=128", "lightning2:schedule=parallel",
                           "lightning2:schedule=parallel,block=32"}) {
    expect_near(input.attend(*make_method(spec)), expected, 5e-5, spec);
  }
  for (const char* spec : {"lightning2", "lightning2:schedule=parallel"}) {
    const auto method = make_method(spec);
    EXPECT_EQ(input.attend(*method, nullptr, KernelKind::automatic, 0, 1, 1),
              input.attend(*method, nullptr, KernelKind::automatic, 0, 1, 3));
  }
}

TEST(Lightning2, NoDecayIsTheUnnormalisedCausalSum) {
  LinearCase input({.name = "sum", .q_heads = 1, .q_len = 70, .kv_len = 70});
  input.add("lambda", {1}, {1.0F});
  const auto none = input.attend(*make_method("lightning2:decay=none"));
  EXPECT_EQ(input.attend(*make_method("lightning2:decay=given")), none);
  for (std::int64_t n = 0; n < 70; ++n) {
    double sum = 0;
    for (std::int64_t j = 0; j <= n; ++j) {
      double score = 0;
      for (std::int64_t d = 0; d < 16; ++d) score += input.input.q(0, 0, n, d) * input.input.k(0, 0, j, d);
      sum += score * input.v(0, 0, j, 3);
    }
    ASSERT_NEAR(none[n * 8 + 3], sum, 1e-3);
  }
}

TEST(Lightning2, ScaleActivationNormAndGate) {
  LinearCase input({.name = "layer", .q_heads = 2, .kv_heads = 2, .q_len = 50, .kv_len = 50});
  const std::vector<float> gates = input.draw(2 * 50 * 8, -2, 2);
  const std::vector<float> plain = input.attend(*make_method("lightning2"));
  input.input.problem.scale = 0.5F;
  std::vector<float> half = plain;
  for (float& x : half) x *= 0.5F;
  expect_near(input.attend(*make_method("lightning2")), half, 1e-5, "scale");
  input.input.problem.scale = {};

  input.add("output_gate", {1, 2, 50, 8}, gates);
  for (const std::string norm : {"none", "head", "full"}) {
    std::vector<double> expected(plain.begin(), plain.end());
    for (std::int64_t n = 0; n < 50; ++n) {
      double squares[2] = {0, 0};
      for (std::int64_t h = 0; h < 2; ++h) {
        for (std::int64_t d = 0; d < 8; ++d) squares[h] += std::pow(plain[(h * 50 + n) * 8 + d], 2);
      }
      for (std::int64_t h = 0; h < 2; ++h) {
        const double mean = norm == "head" ? squares[h] / 8 : (squares[0] + squares[1]) / 16;
        for (std::int64_t d = 0; d < 8; ++d) {
          const std::int64_t i = (h * 50 + n) * 8 + d;
          if (norm != "none") expected[i] /= std::sqrt(mean + 1e-5);
          expected[i] /= 1 + std::exp(-static_cast<double>(gates[i]));
        }
      }
    }
    expect_near(input.attend(*make_method("lightning2:norm=" + norm)), expected, 1e-4, norm);
  }

  LinearCase activated({.name = "silu", .q_heads = 2, .kv_heads = 2, .q_len = 50, .kv_len = 50});
  const auto answer = activated.attend(*make_method("lightning2:activation=silu"));
  const auto silu = [](float x) { return x / (1 + std::exp(-x)); };
  for (std::int64_t h = 0; h < 2; ++h) {
    for (std::int64_t n = 0; n < 50; ++n) {
      for (std::int64_t d = 0; d < 16; ++d) {
        activated.input.set_q(0, h, n, d, silu(activated.input.q(0, h, n, d)));
        activated.input.set_k(0, h, n, d, silu(activated.input.k(0, h, n, d)));
      }
    }
  }
  expect_near(answer, activated.attend(*make_method("lightning2")), 1e-5, "activation");
}

TEST(Lightning2, ChunksAndDecodeEqualOneShot) {
  for (const CaseShape& shape : {CaseShape{.name = "plain", .batch = 2, .q_len = 147, .kv_len = 147},
                                 CaseShape{.name = "paged", .batch = 2, .q_len = 147, .kv_len = 147, .page_size = 16},
                                 CaseShape{.name = "bnhd", .q_len = 147, .kv_len = 147, .layout = Layout::bnhd}}) {
    test::expect_chunks_and_decode_equal_one_shot(*make_method("lightning2"), LinearCase(shape));
  }
}

TEST(Lightning2, PagesAndLayoutDoNotMatter) {
  const auto method = make_method("lightning2");
  const auto plain = LinearCase({.name = "plain", .batch = 2, .q_len = 90, .kv_len = 130}).attend(*method);
  EXPECT_EQ(LinearCase({.name = "paged", .batch = 2, .q_len = 90, .kv_len = 130, .page_size = 32}).attend(*method),
            plain);
  EXPECT_EQ(
      LinearCase({.name = "bnhd", .batch = 2, .q_len = 90, .kv_len = 130, .layout = Layout::bnhd}).attend(*method),
      plain);
}

TEST(Lightning2, HasNoPlan) {
  const LinearCase input({.name = "plan", .q_len = 20, .kv_len = 20});
  const auto method = make_method("lightning2");
  EXPECT_FALSE(method->info().has_plan);
  EXPECT_TRUE(make_method("dense")->info().has_plan);
  EXPECT_THAT(message_of([&] { method->plan(input.problem(), input.input.inputs, {}); }),
              HasSubstr("method 'lightning2' is a recurrence and has no plan"));
}

TEST(Lightning2, RefusesWhatItCannotDo) {
  const auto method = make_method("lightning2");
  const auto message = [&](CaseShape shape, const std::function<void(LinearCase&)>& spoil = {},
                           const std::string& spec = "lightning2") {
    LinearCase input(std::move(shape));
    if (spoil) spoil(input);
    return message_of([&] { input.attend(*make_method(spec)); });
  };
  const CaseShape good{.name = "good", .q_len = 20, .kv_len = 20};
  EXPECT_EQ(message(good), "no error");
  EXPECT_THAT(message({.name = "b", .q_len = 20, .kv_len = 20, .causal = false}), HasSubstr("not causal"));
  EXPECT_THAT(message({.name = "q", .q_len = 20, .kv_len = 10}), HasSubstr("20 queries and 10 keys"));
  EXPECT_THAT(message({.name = "o", .q_len = 20, .kv_len = 30, .q_offset = 3}), HasSubstr("position 3; expected 10"));
  EXPECT_THAT(message(good, [](LinearCase& c) { c.input.inputs.modifiers.softcap = 3; }), HasSubstr("modifiers"));
  EXPECT_THAT(message(good, {}, "lightning2:decay=given"), HasSubstr("side input 'lambda' is missing"));
  EXPECT_THAT(message(
                  good,
                  [](LinearCase& c) {
                    c.add("lambda", {3}, {1, 1, 1});
                  },
                  "lightning2:decay=given"),
              HasSubstr("'lambda' has shape [1, 1, 1, 3]; expected [1, 1, 1, 2]"));
  EXPECT_THAT(message(
                  good,
                  [](LinearCase& c) {
                    c.add("lambda", {2}, {1, 1.5F});
                  },
                  "lightning2:decay=given"),
              HasSubstr("lambda of head 1 is 1.5"));
  EXPECT_THAT(message_of([] { make_method("lightning2:block=40"); }), HasSubstr("block=40 is not a multiple of 16"));
}

TEST(Lightning2, StatesBelongToOneSequenceAndShape) {
  const auto method = make_method("lightning2");
  const auto state = method->new_state();
  const LinearCase input({.name = "state", .q_len = 50, .kv_len = 50});
  input.attend(*method, state.get());
  const LinearCase gap({.name = "gap", .q_len = 10, .kv_len = 70});
  EXPECT_THAT(message_of([&] { gap.attend(*method, state.get()); }),
              HasSubstr("has seen 50 tokens, but 60 of its 70 keys"));
  const LinearCase heads({.name = "heads", .q_heads = 4, .q_len = 5, .kv_len = 55});
  EXPECT_THAT(message_of([&] { heads.attend(*method, state.get()); }), HasSubstr("for 1 sequences, 2 heads"));
  class Foreign final : public MethodState {
  } foreign;
  EXPECT_THAT(message_of([&] { input.attend(*method, &foreign); }), HasSubstr("state is of another method"));
}

TEST(Lightning2, LogSumExpIsZero) {
  const LinearCase input({.name = "lse", .q_len = 20, .kv_len = 20});
  std::vector<float> o(2 * 20 * 8);
  std::vector<float> lse(2 * 20, 7.0F);
  make_method("lightning2")->attend(input.problem(), input.input.inputs, {input.view_o(o), lse}, {});
  EXPECT_EQ(lse, std::vector<float>(40, 0.0F));
  lse.pop_back();
  EXPECT_THROW(make_method("lightning2")->attend(input.problem(), input.input.inputs, {input.view_o(o), lse}, {}),
               Error);
}

TEST(Lightning2, GradientsMatchCentralDifferences) {
  test::LayerSettings plain{.spec = "lightning2:decay=retnet"};
  plain.decay = "slope";
  test::LayerGradient retnet(plain);
  retnet.slopes = {std::log(1 - 1 / 32.0), std::log(1 - 1 / 64.0)};
  retnet.check();
  test::LayerSettings s = plain;
  s.spec = "lightning2:decay=given,activation=silu,norm=full,block=16";
  s.decay = "lambda";
  s.silu = true;
  s.norm = "full";
  s.curve = "sigmoid";
  s.q_heads = s.side_heads = 4;
  s.kv_heads = 2;
  s.tokens = 45;
  s.queries = 30;
  s.initial_state = true;
  test::LayerGradient(s, 2).check();
  s = plain;
  s.spec = "lightning2:decay=none,norm=head,schedule=parallel";
  s.decay = "none";
  s.norm = "head";
  s.batch = 2;
  s.tokens = s.queries = 33;
  test::LayerGradient(s, 3).check();
  s = plain;
  s.spec = "lightning2:decay=given";
  s.decay = "lambda";
  s.q_lens = {7, 1, 30};
  s.kv_lens = {7, 1, 31};
  test::LayerGradient(s, 4).check();
}

}  // namespace
}  // namespace tessera
