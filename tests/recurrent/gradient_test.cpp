// Gradients: the float64 reference against central differences, the chunked form against the reference.
#include <gmock/gmock.h>

#include <functional>

#include "recurrent/recurrent_case.h"
#include "recurrent/reference.h"

namespace tessera {
namespace {

using recurrent::ReferenceGradients;
using recurrent::ReferenceHead;
using test::Decay;
using test::deviation;
using test::OwnTensor;
using test::RecurrentCase;
using test::RecurrentShape;

struct Rule {
  Decay decay;
  bool delta;
};
const std::vector<Rule> kRules{{Decay::none, false}, {Decay::scalar, false}, {Decay::channel, false},
                               {Decay::none, true},  {Decay::scalar, true},  {Decay::channel, true}};

std::vector<double> random_numbers(std::size_t count, std::mt19937& random, double low, double high) {
  std::uniform_real_distribution<double> uniform(low, high);
  std::vector<double> numbers(count);
  for (double& x : numbers) x = uniform(random);
  return numbers;
}

TEST(RecurrentGradient, ReferenceIsTheCentralDifference) {
  for (const Rule& rule : kRules) {
    std::mt19937 random(7);
    ReferenceHead head{.tokens = 7, .head_dim = 3, .value_dim = 2, .scale = 0.6};
    head.q = random_numbers(21, random, -1, 1);
    head.k = random_numbers(21, random, -0.6, 0.6);
    head.v = random_numbers(14, random, -1, 1);
    if (rule.decay != Decay::none) head.decay = random_numbers(rule.decay == Decay::scalar ? 7 : 21, random, -1.5, 0);
    if (rule.delta) head.beta = random_numbers(7, random, 0, 1);
    head.state = random_numbers(6, random, -1, 1);
    const std::vector<double> d_o = random_numbers(14, random, -1, 1);
    const std::vector<double> d_state = random_numbers(6, random, -1, 1);
    const auto loss = [&](const ReferenceHead& at) {
      const recurrent::ReferenceResult result = recurrent::reference_forward(at);
      double sum = 0;
      for (std::size_t i = 0; i < d_o.size(); ++i) sum += d_o[i] * result.o[i];
      for (std::size_t i = 0; i < d_state.size(); ++i) sum += d_state[i] * result.state[i];
      return sum;
    };
    const ReferenceGradients gradients = recurrent::reference_backward(head, d_o, d_state);
    const auto check = [&](std::vector<double> ReferenceHead::*member, const std::vector<double>& gradient,
                           const char* what) {
      ASSERT_EQ(gradient.size(), (head.*member).size());
      for (std::size_t i = 0; i < gradient.size(); ++i) {
        constexpr double h = 1e-5;
        ReferenceHead up = head;
        ReferenceHead down = head;
        (up.*member)[i] += h;
        (down.*member)[i] -= h;
        EXPECT_NEAR(gradient[i], (loss(up) - loss(down)) / (2 * h), 2e-9) << what << "[" << i << "]";
      }
    };
    check(&ReferenceHead::q, gradients.q, "q");
    check(&ReferenceHead::k, gradients.k, "k");
    check(&ReferenceHead::v, gradients.v, "v");
    check(&ReferenceHead::decay, gradients.decay, "decay");
    check(&ReferenceHead::beta, gradients.beta, "beta");
    check(&ReferenceHead::state, gradients.state, "state");
  }
}

/// Gradients of one call, owned.
struct OwnGradients {
  OwnTensor q, k, v, decay, beta;
  std::vector<float> state;
};

/// What flows back, and the call.
class Backward {
 public:
  explicit Backward(const RecurrentCase& of) : input(of) {
    std::mt19937 random(11);
    std::normal_distribution<float> normal;
    grad_o.allocate({of.q.view.shape[0], of.problem.heads, of.problem.q_len, of.problem.value_dim}, DType::f32);
    grad_o.fill([&] { return normal(random); });
    grad_state.resize(of.state.size());
    for (float& x : grad_state) x = normal(random);
  }

  OwnGradients run(const RecurrentOptions& options) const {
    OwnGradients out;
    const auto like = [&](OwnTensor& tensor, const TensorView& view) {
      if (view.data != nullptr) tensor.allocate(view.shape, dtype);
    };
    like(out.q, input.inputs.q);
    like(out.k, input.inputs.k);
    like(out.v, input.inputs.v);
    like(out.decay, input.inputs.decay);
    like(out.beta, input.inputs.beta);
    out.state.resize(input.state.size());
    const RecurrentGradients gradients{.q = out.q.view,
                                       .k = out.k.view,
                                       .v = out.v.view,
                                       .decay = out.decay.view,
                                       .beta = out.beta.view,
                                       .initial_state = out.state};
    run_recurrent_backward(input.problem, input.inputs, input.state, grad_o.view, grad_state, gradients, options);
    return out;
  }

  const RecurrentCase& input;
  OwnTensor grad_o;
  std::vector<float> grad_state;
  DType dtype = DType::f32;
};

void expect_same(const OwnGradients& actual, const OwnGradients& expected, double tolerance, const std::string& what) {
  EXPECT_LE(deviation(actual.q.numbers(), expected.q.numbers()), tolerance) << what << ", q";
  EXPECT_LE(deviation(actual.k.numbers(), expected.k.numbers()), tolerance) << what << ", k";
  EXPECT_LE(deviation(actual.v.numbers(), expected.v.numbers()), tolerance) << what << ", v";
  EXPECT_LE(deviation(actual.state, expected.state), tolerance) << what << ", initial state";
  if (!expected.decay.storage.empty()) {
    EXPECT_LE(deviation(actual.decay.numbers(), expected.decay.numbers()), tolerance) << what << ", decay";
  }
  if (!expected.beta.storage.empty()) {
    EXPECT_LE(deviation(actual.beta.numbers(), expected.beta.numbers()), tolerance) << what << ", beta";
  }
}

/// Sums of products of products of float32; the decays' gradients are differences of such sums.
constexpr double kTolerance = 1e-4;

std::string describe(const RecurrentShape& shape) {
  return "tokens " + std::to_string(shape.tokens) + ", decay " + std::to_string(static_cast<int>(shape.decay)) +
         ", delta " + std::to_string(static_cast<int>(shape.delta));
}

void expect_reference(RecurrentShape shape, const RecurrentOptions& options = {}) {
  for (const Rule& rule : kRules) {
    shape.decay = rule.decay;
    shape.delta = rule.delta;
    const RecurrentCase input(shape);
    const Backward backward(input);
    expect_same(backward.run(options), backward.run({.form = RecurrentForm::reference}), kTolerance, describe(shape));
  }
}

TEST(RecurrentGradient, ChunkedIsTheReference) {
  for (const std::int64_t tokens : {1, 15, 16, 17, 64, 65, 150}) {
    expect_reference({.heads = 2, .head_dim = 20, .value_dim = 24, .tokens = tokens});
  }
}

TEST(RecurrentGradient, EveryInstructionSetDimensionAndChunk) {
  for (const Isa isa : supported_isas()) {
    expect_reference({.head_dim = 64, .value_dim = 33, .tokens = 70}, {.isa = isa});
    expect_reference({.head_dim = 1, .value_dim = 1, .tokens = 40}, {.isa = isa});
  }
  for (const std::int64_t chunk : {16, 48, 128}) expect_reference({.tokens = 200}, {.chunk = chunk});
}

TEST(RecurrentGradient, ManySegments) {
  // 16 tokens a chunk: more chunks than are kept at once, so that there is a first pass.
  expect_reference({.tokens = 4400, .decay_scale = 0.02F}, {.chunk = 16});
}

TEST(RecurrentGradient, BatchesGroupsAndVariableLengths) {
  expect_reference({.batch = 3, .heads = 2, .tokens = 70});
  expect_reference({.batch = 2, .heads = 4, .q_heads = 2, .k_heads = 2, .tokens = 40});
  expect_reference({.heads = 4, .k_heads = 1, .v_heads = 1, .tokens = 40});
  expect_reference({.heads = 2, .tokens = 150, .queries = 30});
  expect_reference({.heads = 2, .lengths = {130, 0, 1, 70}, .query_lengths = {2, 0, 1, 66}});
}

TEST(RecurrentGradient, NormalisedQueriesAndKeys) {
  expect_reference({.heads = 2, .head_dim = 20, .tokens = 70, .normalise = true});
  // The reference itself: moving x along x changes nothing but for epsilon.
  const RecurrentCase input({.tokens = 20, .decay = Decay::channel, .delta = true, .normalise = true});
  const OwnGradients gradients = Backward(input).run({.form = RecurrentForm::reference});
  for (std::int64_t n = 0; n < 20; ++n) {
    double along = 0;
    double size = 0;
    for (std::int64_t d = 0; d < 16; ++d) {
      along += gradients.k.get(0, 0, n, d) * input.k.get(0, 0, n, d);
      size += std::abs(gradients.k.get(0, 0, n, d) * input.k.get(0, 0, n, d));
    }
    EXPECT_NEAR(along, 0, 1e-5 * size) << n;
    EXPECT_GT(size, 0) << n;
  }
}

TEST(RecurrentGradient, SharedDecaysAndBetasSum) {
  RecurrentCase input({.heads = 4, .tokens = 50, .decay = Decay::channel, .delta = true});
  input.inputs.decay.shape[1] = input.inputs.beta.shape[1] = 2;
  const Backward backward(input);
  expect_same(backward.run({}), backward.run({.form = RecurrentForm::reference}), kTolerance, "shared");
}

TEST(RecurrentGradient, StrongDecays) {
  for (const float scale : {5.0F, 60.0F}) expect_reference({.tokens = 100, .decay_scale = scale});
}

TEST(RecurrentGradient, HalfPrecision) {
  const RecurrentCase input({.heads = 2, .tokens = 90, .decay = Decay::channel, .delta = true, .dtype = DType::bf16});
  Backward backward(input);
  backward.dtype = DType::bf16;
  const OwnGradients actual = backward.run({});
  backward.dtype = DType::f32;
  const OwnGradients expected = backward.run({.form = RecurrentForm::reference});
  for (const auto& [got, want] : {std::pair{&actual.k, &expected.k}, {&actual.decay, &expected.decay}}) {
    const std::vector<float> a = got->numbers();
    const std::vector<float> b = want->numbers();
    ASSERT_EQ(a.size(), b.size());
    for (std::size_t i = 0; i < a.size(); ++i) EXPECT_NEAR(a[i], b[i], std::abs(b[i]) / 256 + 1e-3) << i;  // bf16
  }
}

TEST(RecurrentGradient, ThreadsDoNotMatter) {
  const RecurrentCase input(
      {.heads = 6, .k_heads = 2, .v_heads = 2, .tokens = 150, .decay = Decay::channel, .delta = true});
  const Backward backward(input);
  const OwnGradients one = backward.run({.threads = 1});
  for (const int threads : {2, 5}) {
    const OwnGradients many = backward.run({.threads = threads});
    EXPECT_EQ(many.k.numbers(), one.k.numbers());
    EXPECT_EQ(many.decay.numbers(), one.decay.numbers());
    EXPECT_EQ(many.state, one.state);
  }
}

TEST(RecurrentGradient, SkippedTokensHaveNone) {
  RecurrentCase input({.tokens = 60, .queries = 20, .decay = Decay::scalar});
  input.problem.skip = {40};
  const OwnGradients actual = Backward(input).run({});
  for (std::int64_t n = 0; n < 40; ++n) EXPECT_EQ(actual.v.get(0, 0, n, 1), 0.0F);
  EXPECT_NE(actual.v.get(0, 0, 40, 1), 0.0F);
}

TEST(RecurrentGradient, WantsOnlyWhatItIsAskedFor) {
  const RecurrentCase input({.tokens = 30, .decay = Decay::scalar, .delta = true});
  const Backward backward(input);
  const OwnGradients all = backward.run({});
  OwnTensor v;
  v.allocate(input.inputs.v.shape, DType::f32);
  run_recurrent_backward(input.problem, input.inputs, input.state, backward.grad_o.view, backward.grad_state,
                         {.v = v.view});
  EXPECT_EQ(v.numbers(), all.v.numbers());
}

TEST(RecurrentGradient, RefusesWhatDoesNotFit) {
  const RecurrentCase input({.tokens = 30});
  const Backward backward(input);
  const auto message = [&](const RecurrentGradients& gradients, std::span<const float> initial = {}) {
    try {
      run_recurrent_backward(input.problem, input.inputs, initial, backward.grad_o.view, {}, gradients);
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string("no error");
  };
  OwnTensor wrong;
  wrong.allocate({1, 1, 30, 8}, DType::f32);
  EXPECT_THAT(message({.q = wrong.view}), testing::HasSubstr("gradient of q has shape [1, 1, 30, 8]"));
  EXPECT_THAT(message({.beta = wrong.view}), testing::HasSubstr("beta is not given"));
  MutableTensorView repeated = mutable_view_of(wrong.storage.data(), DType::f32, {1, 1, 30, 16});
  repeated.strides[2] = 0;
  EXPECT_THAT(message({.k = repeated}), testing::HasSubstr("stride 0 on axis 2"));
  EXPECT_THAT(message({}, std::vector<float>(3)), testing::HasSubstr("initial_state has 3 elements"));
}

}  // namespace
}  // namespace tessera
