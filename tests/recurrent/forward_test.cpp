// The forms of the recurrence against float64, and what linear attention and the delta rule promise.
#include <gmock/gmock.h>

#include <functional>

#include "recurrent/recurrent_case.h"

namespace tessera {
namespace {

using test::Decay;
using test::deviation;
using test::expect_same;
using test::RecurrentAnswer;
using test::RecurrentCase;
using test::RecurrentShape;
using testing::HasSubstr;

/// float32 products of a few hundred terms, against float64.
constexpr double kTolerance = 2e-5;

const RecurrentOptions kReference{.form = RecurrentForm::reference};

std::string name_of_case(const RecurrentShape& shape) {
  return "tokens " + std::to_string(shape.tokens) + ", dims " + std::to_string(shape.head_dim) + " x " +
         std::to_string(shape.value_dim) + ", decay " + std::to_string(static_cast<int>(shape.decay)) + ", delta " +
         std::to_string(static_cast<int>(shape.delta));
}

struct Rule {
  Decay decay;
  bool delta;
};
const std::vector<Rule> kRules{{Decay::none, false}, {Decay::scalar, false}, {Decay::channel, false},
                               {Decay::none, true},  {Decay::scalar, true},  {Decay::channel, true}};

std::vector<RecurrentShape> with_rules(const RecurrentShape& shape) {
  std::vector<RecurrentShape> shapes;
  for (const Rule& rule : kRules) {
    shapes.push_back(shape);
    shapes.back().decay = rule.decay;
    shapes.back().delta = rule.delta;
  }
  return shapes;
}

TEST(Recurrent, EveryFormIsTheFloat64Recurrence) {
  for (const std::int64_t tokens : {1, 2, 15, 16, 17, 63, 64, 65, 129, 200}) {
    for (const RecurrentShape& shape : with_rules({.heads = 2, .head_dim = 32, .value_dim = 48, .tokens = tokens})) {
      const RecurrentCase input(shape);
      const RecurrentAnswer expected = input.run(kReference);
      for (const RecurrentForm form : {RecurrentForm::automatic, RecurrentForm::chunked, RecurrentForm::stepwise}) {
        expect_same(input.run({.form = form}), expected, kTolerance, name_of_case(shape));
      }
    }
  }
}

TEST(Recurrent, EveryHeadDimensionAndInstructionSet) {
  for (const auto& [head_dim, value_dim] : std::vector<std::pair<std::int64_t, std::int64_t>>{
           {16, 16}, {20, 7}, {1, 1}, {64, 128}, {100, 33}, {256, 256}}) {
    for (const RecurrentShape& shape : with_rules({.head_dim = head_dim, .value_dim = value_dim, .tokens = 83})) {
      const RecurrentCase input(shape);
      const RecurrentAnswer expected = input.run(kReference);
      for (const Isa isa : supported_isas()) {
        const std::string what = name_of_case(shape) + ", " + std::string(name_of(isa));
        expect_same(input.run({.form = RecurrentForm::chunked, .isa = isa}), expected, kTolerance, what);
        expect_same(input.run({.form = RecurrentForm::stepwise, .isa = isa}), expected, kTolerance, what);
      }
    }
  }
}

TEST(Recurrent, ChunkSizeDoesNotMatter) {
  for (const RecurrentShape& shape : with_rules({.head_dim = 24, .value_dim = 16, .tokens = 301})) {
    const RecurrentCase input(shape);
    const RecurrentAnswer expected = input.run(kReference);
    for (const std::int64_t chunk : {16, 32, 48, 64, 128}) {
      expect_same(input.run({.form = RecurrentForm::chunked, .chunk = chunk}), expected, kTolerance,
                  name_of_case(shape) + ", chunk " + std::to_string(chunk));
    }
  }
}

TEST(Recurrent, BatchesGroupsAndVariableLengths) {
  for (RecurrentShape base :
       {RecurrentShape{.batch = 3, .heads = 2, .tokens = 70},
        RecurrentShape{.batch = 2, .heads = 4, .q_heads = 2, .k_heads = 2, .tokens = 70},
        RecurrentShape{.batch = 1, .heads = 4, .k_heads = 1, .v_heads = 1, .tokens = 70},
        RecurrentShape{.heads = 2, .tokens = 150, .queries = 30},
        RecurrentShape{.heads = 2, .tokens = 150, .queries = 0}, RecurrentShape{.heads = 2, .lengths = {130, 0, 1, 70}},
        RecurrentShape{.heads = 2, .lengths = {130, 5, 1, 70}, .query_lengths = {2, 0, 1, 66}}}) {
    base.head_dim = 24;
    for (const RecurrentShape& shape : with_rules(base)) {
      const RecurrentCase input(shape);
      const RecurrentAnswer expected = input.run(kReference);
      expect_same(input.run({.form = RecurrentForm::chunked}), expected, kTolerance, name_of_case(shape));
      expect_same(input.run({.form = RecurrentForm::stepwise}), expected, kTolerance, name_of_case(shape));
    }
  }
}

TEST(Recurrent, SequencesDoNotSeeEachOther) {
  const RecurrentCase together({.heads = 2, .decay = Decay::channel, .delta = true, .lengths = {130, 75}});
  const RecurrentAnswer all = together.run({});
  RecurrentCase alone({.heads = 2, .tokens = 75, .decay = Decay::channel, .delta = true});
  alone.inputs.q.data = together.q.view.row(0, 0, 130);
  alone.inputs.k.data = together.k.view.row(0, 0, 130);
  alone.inputs.v.data = together.v.view.row(0, 0, 130);
  alone.inputs.decay.data = together.decay.view.row(0, 0, 130);
  alone.inputs.beta.data = together.beta.view.row(0, 0, 130);
  for (TensorView* view :
       {&alone.inputs.q, &alone.inputs.k, &alone.inputs.v, &alone.inputs.decay, &alone.inputs.beta}) {
    view->strides[1] = 205 * view->shape[3];
  }
  alone.state.assign(together.state.begin() + 2 * 256, together.state.end());
  const RecurrentAnswer one = alone.run({});
  for (std::int64_t n = 0; n < 75; ++n) {
    for (std::int64_t d = 0; d < 16; ++d) ASSERT_EQ(all.o.get(0, 1, 130 + n, d), one.o.get(0, 1, n, d)) << n;
  }
}

TEST(Recurrent, GroupedHeadsAreRepeatedHeads) {
  const RecurrentCase grouped(
      {.heads = 4, .q_heads = 2, .k_heads = 2, .tokens = 90, .decay = Decay::scalar, .delta = true});
  RecurrentCase repeated({.heads = 4, .tokens = 90, .decay = Decay::scalar, .delta = true});
  repeated.inputs.v = grouped.inputs.v;
  repeated.inputs.decay = grouped.inputs.decay;
  repeated.inputs.beta = grouped.inputs.beta;
  repeated.state = grouped.state;
  for (std::int64_t h = 0; h < 4; ++h) {
    for (std::int64_t n = 0; n < 90; ++n) {
      for (std::int64_t d = 0; d < 16; ++d) {
        repeated.q.set(0, h, n, d, grouped.q.get(0, h / 2, n, d));
        repeated.k.set(0, h, n, d, grouped.k.get(0, h / 2, n, d));
      }
    }
  }
  EXPECT_EQ(grouped.run({}).o.numbers(), repeated.run({}).o.numbers());
}

TEST(Recurrent, NormalisesQueriesAndKeys) {
  for (const RecurrentShape& shape : with_rules({.heads = 2, .head_dim = 20, .tokens = 70, .normalise = true})) {
    const RecurrentCase input(shape);
    const RecurrentAnswer expected = input.run(kReference);
    for (const RecurrentForm form : {RecurrentForm::chunked, RecurrentForm::stepwise}) {
      expect_same(input.run({.form = form}), expected, kTolerance, name_of_case(shape));
    }
    RecurrentCase longer = input;
    longer.k.fill([&, i = std::int64_t{0}]() mutable {
      const float x = input.k.get(0, i / 1400, i % 1400 / 20, i % 20);
      ++i;
      return 3 * x;
    });
    expect_same(longer.run({}), expected, 1e-4, "keys three times as long");
  }
}

TEST(Recurrent, DecaysAndBetasMayBeShared) {
  RecurrentCase shared({.heads = 4, .tokens = 50, .decay = Decay::channel, .delta = true});
  RecurrentCase repeated = shared;
  for (std::int64_t h = 0; h < 4; ++h) {
    for (std::int64_t n = 0; n < 50; ++n) {
      repeated.beta.set(0, h, n, 0, shared.beta.get(0, h / 2, n, 0));
      for (std::int64_t d = 0; d < 16; ++d) repeated.decay.set(0, h, n, d, shared.decay.get(0, h / 2, n, d));
    }
  }
  shared.inputs.decay.shape[1] = shared.inputs.beta.shape[1] = 2;
  EXPECT_EQ(shared.run({}).o.numbers(), repeated.run({}).o.numbers());
}

TEST(Recurrent, ReadsAndWritesHalfPrecision) {
  for (const DType dtype : {DType::bf16, DType::f16}) {
    for (const RecurrentShape& shape :
         with_rules({.heads = 2, .head_dim = 40, .value_dim = 24, .tokens = 100, .dtype = dtype})) {
      const RecurrentCase input(shape);
      const RecurrentAnswer expected = input.run(kReference);
      for (const RecurrentForm form : {RecurrentForm::chunked, RecurrentForm::stepwise}) {
        const RecurrentAnswer actual = input.run({.form = form});
        // Both round their outputs; a state is float32.
        EXPECT_LE(deviation(actual.o.numbers(), expected.o.numbers()), dtype == DType::bf16 ? 0.04 : 0.005);
        EXPECT_LE(deviation(actual.state, expected.state), kTolerance);
      }
    }
  }
}

TEST(Recurrent, StridesOfTensorsWithTokensBeforeHeads) {
  RecurrentCase input({.batch = 2, .heads = 3, .tokens = 40, .decay = Decay::channel, .delta = true});
  const RecurrentAnswer expected = input.run({});
  test::OwnTensor other;
  other.allocate({2, 3, 40, 16}, DType::f32);
  other.view = mutable_view_of(other.storage.data(), DType::f32, {2, 3, 40, 16}, Layout::bnhd);
  for (std::int64_t b = 0; b < 2; ++b) {
    for (std::int64_t h = 0; h < 3; ++h) {
      for (std::int64_t n = 0; n < 40; ++n) {
        for (std::int64_t d = 0; d < 16; ++d) other.set(b, h, n, d, input.k.get(b, h, n, d));
      }
    }
  }
  input.inputs.k = other.view;
  EXPECT_EQ(input.run({}).o.numbers(), expected.o.numbers());
}

TEST(Recurrent, ThreadsDoNotMatter) {
  for (const std::int64_t heads : {1, 2, 5}) {
    for (const RecurrentShape& shape : with_rules({.heads = heads, .head_dim = 32, .value_dim = 80, .tokens = 1300})) {
      const RecurrentCase input(shape);
      for (const RecurrentForm form : {RecurrentForm::chunked, RecurrentForm::stepwise}) {
        const RecurrentAnswer one = input.run({.form = form, .threads = 1});
        for (const int threads : {2, 3, 7}) {
          const RecurrentAnswer many = input.run({.form = form, .threads = threads});
          EXPECT_EQ(many.o.numbers(), one.o.numbers()) << name_of_case(shape) << ", threads " << threads;
          EXPECT_EQ(many.state, one.state) << name_of_case(shape) << ", threads " << threads;
        }
      }
    }
  }
}

TEST(Recurrent, ParallelScheduleIsTheLoop) {
  for (const Decay decay : {Decay::none, Decay::scalar, Decay::channel}) {
    const RecurrentCase input({.heads = 2,
                               .head_dim = 20,
                               .value_dim = 24,
                               .tokens = 2300,
                               .queries = 2100,
                               .decay = decay,
                               .decay_scale = 0.02F});
    const RecurrentAnswer parallel = input.run({.schedule = RecurrentSchedule::parallel, .threads = 1});
    expect_same(parallel, input.run({}), 1e-4, "decay " + std::to_string(static_cast<int>(decay)));
    EXPECT_EQ(input.run({.schedule = RecurrentSchedule::parallel, .threads = 3}).o.numbers(), parallel.o.numbers());
  }
}

TEST(Recurrent, ContinuesFromAState) {
  for (const RecurrentShape& shape : with_rules({.heads = 2, .tokens = 150})) {
    const RecurrentCase input(shape);
    const RecurrentAnswer whole = input.run({});
    RecurrentAnswer parts = input.run({});
    std::vector<float> state = input.state;
    std::int64_t first = 0;
    for (const std::int64_t count : {70, 1, 33, 1, 1, 44}) {  // the first tokens by chunks, single ones by steps
      RecurrentProblem problem = input.problem;
      problem.kv_len = problem.q_len = count;
      RecurrentInputs inputs = input.inputs;
      for (TensorView* view : {&inputs.q, &inputs.k, &inputs.v, &inputs.decay, &inputs.beta}) {
        if (view->data == nullptr) continue;
        view->data = view->row(0, 0, first);
        view->shape[2] = count;
      }
      MutableTensorView o = parts.o.view;
      o.data = o.row(0, 0, first);
      o.shape[2] = count;
      run_recurrent(problem, inputs, state, o);
      first += count;
    }
    parts.state = state;
    expect_same(parts, whole, kTolerance, name_of_case(shape));
  }
}

TEST(Recurrent, SkippedTokensAreThoseTheStateHasSeen) {
  const RecurrentCase input({.heads = 2, .tokens = 150, .decay = Decay::channel, .delta = true});
  const RecurrentAnswer whole = input.run({});
  std::vector<float> state = input.state;
  for (const std::int64_t seen : {0, 90}) {
    RecurrentProblem problem = input.problem;
    problem.kv_len = seen == 0 ? 90 : 150;
    problem.q_len = problem.kv_len - seen;
    problem.skip = {seen};
    RecurrentInputs inputs = input.inputs;
    inputs.q.data = inputs.q.row(0, 0, seen);
    inputs.q.shape[2] = problem.q_len;
    for (TensorView* view : {&inputs.k, &inputs.v, &inputs.decay, &inputs.beta}) view->shape[2] = problem.kv_len;
    test::OwnTensor o;
    o.allocate({1, 2, problem.q_len, 16}, DType::f32);
    run_recurrent(problem, inputs, state, o.view);
    for (std::int64_t n = 0; n < problem.q_len; ++n) {
      ASSERT_NEAR(o.get(0, 1, n, 3), whole.o.get(0, 1, seen + n, 3), 1e-4);
    }
  }
  EXPECT_LE(deviation(state, whole.state), kTolerance);
}

TEST(Recurrent, NoDecayNoWriteKeepsTheState) {
  for (const Decay decay : {Decay::scalar, Decay::channel}) {
    const RecurrentCase input({.tokens = 100, .decay = decay, .delta = true, .decay_scale = 0});
    test::OwnTensor zeros;
    zeros.allocate({1, 1, 100, 1}, DType::f32);
    RecurrentCase still = input;
    still.inputs.beta = zeros.view;
    EXPECT_EQ(still.run({.form = RecurrentForm::chunked}).state, input.state);
    EXPECT_EQ(still.run({.form = RecurrentForm::stepwise}).state, input.state);
  }
}

TEST(Recurrent, StrongDecaysLeaveTheLastToken) {
  for (const float g : {-50.0F, -1e4F, -std::numeric_limits<float>::infinity()}) {
    for (const Decay decay : {Decay::scalar, Decay::channel}) {
      for (const bool delta : {false, true}) {
        RecurrentCase input({.tokens = 100, .decay = decay, .delta = delta});
        input.decay.fill([&] { return g; });
        for (const RecurrentForm form : {RecurrentForm::chunked, RecurrentForm::stepwise, RecurrentForm::reference}) {
          const RecurrentAnswer answer = input.run({.form = form});
          for (std::int64_t n = 0; n < 100; ++n) {
            double score = 0;
            for (std::int64_t d = 0; d < 16; ++d) score += input.q.get(0, 0, n, d) * input.k.get(0, 0, n, d);
            const double beta = delta ? input.beta.get(0, 0, n, 0) : 1.0;
            ASSERT_NEAR(answer.o.get(0, 0, n, 5), 0.25 * score * beta * input.v.get(0, 0, n, 5), 1e-5) << g << " " << n;
          }
        }
      }
    }
  }
}

TEST(Recurrent, MixedDecaysWithinAChunk) {
  // Resets between tokens that hardly decay: sums of logarithms would lose the small ones beside the large.
  for (const Decay decay : {Decay::scalar, Decay::channel}) {
    RecurrentCase input({.head_dim = 32, .tokens = 200, .decay = decay, .delta = true});
    std::int64_t i = 0;
    input.decay.fill([&] { return ++i % 29 == 0 ? -1e5F : -1e-3F; });
    const RecurrentAnswer expected = input.run(kReference);
    for (const bool product : {false, true}) {
      expect_same(input.run({.form = RecurrentForm::chunked, .product_on_diagonal = product}), expected, kTolerance,
                  "mixed");
    }
  }
}

TEST(Recurrent, ProductOnTheDiagonalIsTheRunningProduct) {
  for (const float bound : {0.1F, 5.0F, 30.0F}) {  // 5: the bounded gate; 30: only the running product can do it
    const RecurrentCase input(
        {.head_dim = 32, .tokens = 150, .decay = Decay::channel, .delta = true, .decay_scale = bound});
    const RecurrentAnswer expected = input.run(kReference);
    expect_same(input.run({.form = RecurrentForm::chunked}), expected, 1e-5, "product");
    expect_same(input.run({.form = RecurrentForm::chunked, .product_on_diagonal = false}), expected, 1e-5, "running");
  }
}

TEST(Recurrent, EqualChannelsAreOneScalar) {
  RecurrentCase channel({.head_dim = 24, .tokens = 130, .decay = Decay::channel, .delta = true});
  RecurrentCase scalar = channel;
  scalar.decay.allocate({1, 1, 130, 1}, DType::f32);
  for (std::int64_t n = 0; n < 130; ++n) {
    const float g = channel.decay.get(0, 0, n, 0);
    scalar.decay.set(0, 0, n, 0, g);
    for (std::int64_t d = 0; d < 24; ++d) channel.decay.set(0, 0, n, d, g);
  }
  channel.inputs.decay = channel.decay.view;
  scalar.inputs.decay = scalar.decay.view;
  for (const auto* c : {&channel, &scalar}) ASSERT_NE(c->inputs.decay.data, nullptr);
  for (RecurrentCase* c : {&channel, &scalar}) {
    c->inputs.q = channel.inputs.q;
    c->inputs.k = channel.inputs.k;
    c->inputs.v = channel.inputs.v;
    c->inputs.beta = channel.inputs.beta;
  }
  expect_same(channel.run({}), scalar.run({}), kTolerance, "equal channels");
}

TEST(Recurrent, ZeroDecayIsNoDecay) {
  const RecurrentCase input({.tokens = 130, .decay = Decay::scalar, .delta = true, .decay_scale = 0});
  RecurrentCase plain = input;
  plain.inputs.decay = {};
  expect_same(input.run({}), plain.run({}), 1e-6, "DeltaNet");
}

TEST(Recurrent, WithoutDecayItIsTheSumOverKeys) {
  RecurrentCase input({.tokens = 90});
  input.problem.scale = 1.0F;
  std::fill(input.state.begin(), input.state.end(), 0.0F);
  const RecurrentAnswer answer = input.run({});
  for (std::int64_t n = 0; n < 90; ++n) {
    double expected = 0;
    for (std::int64_t j = 0; j <= n; ++j) {
      double score = 0;
      for (std::int64_t d = 0; d < 16; ++d) score += input.q.get(0, 0, n, d) * input.k.get(0, 0, j, d);
      expected += score * input.v.get(0, 0, j, 2);
    }
    ASSERT_NEAR(answer.o.get(0, 0, n, 2), expected, 1e-4);
  }
}

TEST(Recurrent, DeltaRuleRecallsAndReplaces) {
  // Unit keys e_0 .. e_15, then e_3 again with another value.
  RecurrentCase input({.tokens = 17, .delta = true});
  input.beta.fill([] { return 1.0F; });
  input.k.fill([] { return 0.0F; });
  for (std::int64_t n = 0; n < 17; ++n) input.k.set(0, 0, n, n == 16 ? 3 : n, 1.0F);
  for (const RecurrentForm form : {RecurrentForm::chunked, RecurrentForm::stepwise}) {
    const RecurrentAnswer answer = input.run({.form = form});
    for (std::int64_t j = 0; j < 16; ++j) {
      for (std::int64_t d = 0; d < 16; ++d) {
        ASSERT_NEAR(answer.state[j * 16 + d], input.v.get(0, 0, j == 3 ? 16 : j, d), 1e-5) << "key " << j;
      }
    }
  }
  RecurrentCase sum = input;
  sum.inputs.beta = {};
  std::fill(sum.state.begin(), sum.state.end(), 0.0F);
  EXPECT_NEAR(sum.run({}).state[3 * 16], input.v.get(0, 0, 3, 0) + input.v.get(0, 0, 16, 0), 1e-5);
}

TEST(Recurrent, BetaUpToTwoIsStable) {
  RecurrentCase input({.head_dim = 16, .tokens = 2000, .delta = true});
  input.beta.fill([] { return 2.0F; });
  expect_same(input.run({}), input.run(kReference), 1e-3, "reflections");
}

std::string message_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

TEST(Recurrent, RefusesWhatDoesNotFit) {
  const RecurrentCase good({.heads = 2, .tokens = 20, .decay = Decay::channel, .delta = true});
  const auto message = [&](const std::function<void(RecurrentCase&)>& spoil, const RecurrentOptions& options = {}) {
    RecurrentCase bad = good;
    spoil(bad);
    return message_of([&] { bad.run(options); });
  };
  EXPECT_EQ(message([](RecurrentCase&) {}), "no error");
  EXPECT_THAT(message([](RecurrentCase& c) { c.problem.k_heads = 3; }),
              HasSubstr("k_heads is 3; expected a divisor of heads 2"));
  EXPECT_THAT(message([](RecurrentCase& c) { c.problem.head_dim = 0; }), HasSubstr("head_dim is 0"));
  EXPECT_THAT(message([](RecurrentCase& c) { c.problem.q_len = 21; }), HasSubstr("21 queries and 20 tokens"));
  EXPECT_THAT(message([](RecurrentCase& c) { c.problem.skip = {-1}; }), HasSubstr("skip of sequence 0 is -1"));
  EXPECT_THAT(message([](RecurrentCase& c) { c.problem.scale = std::numeric_limits<float>::quiet_NaN(); }),
              HasSubstr("scale"));
  EXPECT_THAT(message([](RecurrentCase& c) { c.inputs.decay.shape[3] = 8; }),
              HasSubstr("decay has shape [1, 2, 20, 8]"));
  EXPECT_THAT(message([](RecurrentCase& c) { c.inputs.beta.shape[2] = 19; }), HasSubstr("beta has shape"));
  EXPECT_THAT(message([](RecurrentCase& c) { c.inputs.k.dtype = DType::i32; }), HasSubstr("k has dtype i32"));
  EXPECT_THAT(message([](RecurrentCase& c) { c.inputs.v.data = nullptr; }), HasSubstr("v has no data"));
  EXPECT_THAT(message([](RecurrentCase& c) { c.state.pop_back(); }), HasSubstr("state has 511 elements"));
  EXPECT_THAT(message([](RecurrentCase&) {}, {.chunk = 40}), HasSubstr("chunk is 40"));
  EXPECT_THAT(message([](RecurrentCase&) {}, {.schedule = RecurrentSchedule::parallel}),
              HasSubstr("schedule is parallel"));
  for (const float g : {0.5F, std::numeric_limits<float>::quiet_NaN()}) {
    for (const RecurrentForm form : {RecurrentForm::chunked, RecurrentForm::stepwise, RecurrentForm::reference}) {
      RecurrentCase bad = good;
      test::OwnTensor decay;
      decay.allocate({1, 2, 20, 16}, DType::f32);
      decay.set(0, 1, 17, 4, g);
      bad.inputs.decay = decay.view;
      EXPECT_THAT(message_of([&] { bad.run({.form = form}); }), HasSubstr("head 1, token 17, channel 4"));
    }
  }
}

}  // namespace
}  // namespace tessera
