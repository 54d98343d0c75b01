// gated: the gate, its shapes, and what lies inside.
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <map>
#include <random>

#include "methods/masks.h"

namespace tessera {
namespace {

using test::AttentionCase;

struct Gate {
  std::vector<float> logits;
  std::int64_t dim;

  Gate(const AttentionCase& c, std::int64_t width, float constant = 0) : dim(width) {
    const Problem& p = c.problem;
    const std::int64_t batch = p.variable_length() ? 1 : p.batch;
    logits.assign(static_cast<std::size_t>(batch * p.q_heads * p.q_len * dim), constant);
    if (constant != 0) return;
    for (std::size_t i = 0; i < logits.size(); ++i) logits[i] = std::sin(static_cast<float>(i) * 0.7F) * 3;
  }
  SideTensor side(const AttentionCase& c) const {
    const Problem& p = c.problem;
    return {"gate", view_of(logits.data(), DType::f32, {p.variable_length() ? 1 : p.batch, p.q_heads, p.q_len, dim})};
  }
};

std::vector<float> output_of(const std::string& spec, const AttentionCase& c, const std::vector<SideTensor>& side) {
  const Problem& p = c.problem;
  const std::int64_t batch = p.variable_length() ? 1 : p.batch;
  std::vector<float> o(static_cast<std::size_t>(batch * p.q_heads * p.q_len * p.value_dim));
  AttentionInputs inputs = c.inputs;
  inputs.side = side;
  make_method(spec)->attend(p, inputs,
                            {mutable_view_of(o.data(), DType::f32, {batch, p.q_heads, p.q_len, p.value_dim}), {}}, {});
  return o;
}

class GatedShapes : public testing::TestWithParam<test::CaseShape> {};

TEST_P(GatedShapes, IsTheOutputTimesTheSigmoid) {
  const AttentionCase c(GetParam());
  const std::int64_t dim = c.problem.value_dim;
  for (const std::string inner : {"dense", "streaming"}) {
    const std::vector<float> plain = output_of(inner, c, {});
    for (const std::int64_t width : {std::int64_t{1}, dim}) {
      const Gate gate(c, width);
      const std::vector<float> gated = output_of("gated:inner=" + inner, c, {gate.side(c)});
      for (std::size_t i = 0; i < plain.size(); ++i) {
        const float logit = gate.logits[width == 1 ? i / static_cast<std::size_t>(dim) : i];
        ASSERT_NEAR(gated[i], plain[i] / (1 + std::exp(-logit)), 1e-5F) << inner << " " << i;
      }
    }
  }
}
INSTANTIATE_TEST_SUITE_P(Shapes, GatedShapes, testing::ValuesIn(test::all_shapes()),
                         [](const auto& shape) { return shape.param.name; });

TEST(Gated, LargeLogitsAreNoGate) {
  const AttentionCase c({.name = "plain", .q_len = 30, .kv_len = 70});
  EXPECT_EQ(output_of("gated", c, {Gate(c, 1, 50).side(c)}), output_of("dense", c, {}));
}

TEST(Gated, RefusesBadGates) {
  const AttentionCase c({.name = "plain", .q_len = 30, .kv_len = 70});
  EXPECT_THROW(output_of("gated", c, {}), Error);
  EXPECT_THROW(output_of("gated", c, {Gate(c, 3).side(c)}), Error);
  SideTensor integers = Gate(c, 1).side(c);
  integers.view.dtype = DType::i32;
  EXPECT_THROW(output_of("gated", c, {integers}), Error);
  EXPECT_THROW(make_method("gated:inner=gated"), Error);
  EXPECT_THROW(make_method("gated:inner=densee"), Error);
}

/// The path of a method file in the test's folder.
std::string file_of(const std::string& name, const std::string& text) {
  std::string path = ::testing::TempDir() + name;
  std::ofstream(path) << text;
  return path;
}

TEST(Gated, RefusesToHoldItself) {
  const std::string path = ::testing::TempDir() + "gated_itself.json";
  file_of("gated_itself.json", R"({"method": "gated", "parameters": {"inner": ")" + path + R"("}})");
  EXPECT_THROW(make_method(path), Error);
  EXPECT_THROW(make_method("gated:inner=" + path), Error);
  const std::string layers = ::testing::TempDir() + "gated_layers.json";
  file_of("gated_layers.json",
          R"({"layers": [{"layers": "0-", "method": "gated", "parameters": {"inner": ")" + layers + R"("}}]})");
  EXPECT_THROW(make_method(layers), Error);
  const std::string twice = file_of("gated_twice.json", R"({"method": "gated"})");
  EXPECT_THROW(make_method("gated:inner=" + twice), Error);
}

TEST(Gated, ModelsAreCheckedByTheInnerMethod) {
  const std::string path =
      file_of("gated_duo.json", R"({"method": "duo", "parameters": {"heads": {"retrieval": [[1, 0]]}}})");
  const auto method = make_method("gated:inner=" + path);
  EXPECT_NO_THROW(method->check_model(1, 4, 2));
  EXPECT_THROW(method->check_model(2, 4, 2), Error);
}

/// One case with gate logits and an output gradient as float64 numbers, and the outputs by definition.
struct GatedGradient {
  using Numbers = std::map<std::string, std::vector<double>>;

  GatedGradient(const test::CaseShape& shape, std::int64_t width)
      : c(shape), gate(c, width), batch(c.problem.variable_length() ? 1 : c.problem.batch) {
    const Problem& p = c.problem;
    d_o.resize(static_cast<std::size_t>(batch * p.q_heads * p.q_len * p.value_dim));
    for (std::size_t i = 0; i < d_o.size(); ++i) d_o[i] = std::cos(static_cast<float>(i) * 0.37F);
    numbers["q"] = flat(c.inputs.q);
    numbers["k"] = flat(c.inputs.k);
    numbers["v"] = flat(c.inputs.v);
    numbers["gate"].assign(gate.logits.begin(), gate.logits.end());
  }

  static std::vector<double> flat(const TensorView& view) {
    std::vector<double> values;
    for (std::int64_t b = 0; b < view.batch(); ++b) {
      for (std::int64_t h = 0; h < view.heads(); ++h) {
        for (std::int64_t n = 0; n < view.tokens(); ++n) {
          for (std::int64_t d = 0; d < view.dim(); ++d)
            values.push_back(load_as_float(view.row(b, h, n), view.dtype, d));
        }
      }
    }
    return values;
  }

  /// Sum of output times output gradient over the pairs that `mask` keeps.
  double loss(const Numbers& x, const std::vector<test::HeadMask>& mask) const {
    const Problem& p = c.problem;
    double total = 0;
    for (std::int64_t s = 0; s < p.batch; ++s) {
      const std::int64_t b = p.tensor_batch_of(s);
      for (std::int64_t h = 0; h < p.q_heads; ++h) {
        const test::HeadMask& kept = mask[static_cast<std::size_t>(s * p.q_heads + h)];
        for (std::int64_t n = 0; n < p.q_len_of(s); ++n) {
          const std::int64_t row = (b * p.q_heads + h) * p.q_len + p.q_begin_of(s) + n;
          std::vector<double> o(static_cast<std::size_t>(p.value_dim), 0.0);
          double sum = 0;
          for (std::int64_t j = 0; j < p.kv_len_of(s); ++j) {
            if (!kept.at(n, j)) continue;
            const std::int64_t key = (b * p.kv_heads + h / p.group()) * p.kv_len + p.kv_begin_of(s) + j;
            double score = 0;
            for (std::int64_t d = 0; d < p.head_dim; ++d) {
              score += x.at("q")[row * p.head_dim + d] * x.at("k")[key * p.head_dim + d];
            }
            const double weight = std::exp(score * p.softmax_scale());
            sum += weight;
            for (std::int64_t d = 0; d < p.value_dim; ++d) o[d] += weight * x.at("v")[key * p.value_dim + d];
          }
          for (std::int64_t d = 0; d < p.value_dim && sum > 0; ++d) {
            const double logit = x.at("gate")[gate.dim == 1 ? row : row * p.value_dim + d];
            total += o[d] / sum / (1 + std::exp(-logit)) * d_o[row * p.value_dim + d];
          }
        }
      }
    }
    return total;
  }

  /// Gradients by the method.
  std::map<std::string, std::vector<float>> gradients(const std::string& spec, Plan& plan, KernelKind kernel) const {
    const Problem& p = c.problem;
    AttentionInputs inputs = c.inputs;
    inputs.side = {gate.side(c)};
    const std::array<std::int64_t, 4> shape{batch, p.q_heads, p.q_len, p.value_dim};
    std::vector<float> o(d_o.size());
    std::vector<float> lse(static_cast<std::size_t>(batch * p.q_heads * p.q_len));
    const auto method = make_method(spec);
    PlanContext context;
    context.run.kernel = kernel;
    method->attend(p, inputs, {mutable_view_of(o.data(), DType::f32, shape), lse}, context, &plan);
    std::map<std::string, std::vector<float>> values;
    for (const auto& [name, tensor] : numbers) values[name].assign(tensor.size(), 99.0F);
    SavedForward saved;
    saved.o = view_of(o.data(), DType::f32, shape);
    saved.d_o = view_of(d_o.data(), DType::f32, shape);
    saved.lse = lse;
    Gradients gradients;
    gradients.d_q = mutable_view_of(values["q"].data(), DType::f32, c.inputs.q.shape);
    gradients.d_k = mutable_view_of(values["k"].data(), DType::f32, c.inputs.k.shape);
    gradients.d_v = mutable_view_of(values["v"].data(), DType::f32, c.inputs.v.shape);
    gradients.side.push_back({"gate", mutable_view_of(values["gate"].data(), DType::f32, inputs.side[0].view.shape)});
    method->backward(p, inputs, saved, gradients, context, &plan);
    return values;
  }

  AttentionCase c;
  Gate gate;
  std::int64_t batch;
  std::vector<float> d_o;
  Numbers numbers;
};

TEST(Gated, GradientsMatchCentralDifferences) {
  unsigned seed = 0;
  for (const test::CaseShape& shape :
       {test::CaseShape{.name = "grouped", .q_heads = 4, .kv_heads = 2, .q_len = 19, .kv_len = 33},
        test::CaseShape{.name = "one", .q_len = 1, .kv_len = 1},
        test::CaseShape{.name = "batch", .batch = 2, .q_len = 17, .kv_len = 17, .causal = false},
        test::CaseShape{.name = "varlen", .q_lens = {9, 0, 3}, .kv_lens = {20, 4, 3}}}) {
    for (const std::string inner : {"dense", "window:left=6"}) {
      for (const std::int64_t width : {1, 8}) {
        GatedGradient g(shape, width);
        Plan plan;
        const std::string file = ::testing::TempDir() + "gated_inner.json";
        std::ofstream(file) << (inner == "dense" ? R"({"method": "dense"})"
                                                 : R"({"method": "window", "parameters": {"left": 6}})");
        const std::string spec = "gated:inner=" + file;
        const auto exact = g.gradients(spec, plan, KernelKind::reference);
        const auto fast = g.gradients(spec, plan, KernelKind::automatic);
        std::vector<test::HeadMask> mask;
        const auto bits = dense_mask(plan);
        for (std::int64_t s = 0; s < plan.problem.batch; ++s) {
          for (std::int64_t h = 0; h < plan.problem.q_heads; ++h) mask.push_back(test::head_mask(plan, bits, s, h));
        }
        std::mt19937 random(++seed);
        GatedGradient::Numbers x = g.numbers;
        for (const auto& [name, actual] : exact) {
          for (int sample = 0; sample < 10; ++sample) {
            const std::size_t i = random() % actual.size();
            double& value = x.at(name)[i];
            const double kept = value;
            value = kept + 1e-5;
            const double above = g.loss(x, mask);
            value = kept - 1e-5;
            const double below = g.loss(x, mask);
            value = kept;
            const double wanted = (above - below) / 2e-5;
            ASSERT_NEAR(actual[i], wanted, 2e-5 * (1 + std::fabs(wanted))) << shape.name << " " << inner << " " << name;
            ASSERT_NEAR(fast.at(name)[i], wanted, 1e-4 * (1 + std::fabs(wanted))) << shape.name << " " << name;
          }
        }
      }
    }
  }
}

TEST(Gated, ClosedGatesHaveNoGradientAndNoNaN) {
  for (const float logit : {-200.0F, -60.0F}) {
    GatedGradient g({.name = "closed", .q_len = 7, .kv_len = 9}, 1);
    std::fill(g.gate.logits.begin(), g.gate.logits.end(), logit);
    Plan plan;
    for (const auto& [name, values] : g.gradients("gated", plan, KernelKind::automatic)) {
      for (const float x : values) ASSERT_NEAR(x, 0, 1e-20) << name;
    }
  }
}

TEST(Gated, BackwardNeedsThatOfTheInnerMethod) {
  GatedGradient g({.name = "plain", .q_len = 20, .kv_len = 20}, 1);
  Plan plan;
  EXPECT_THROW(g.gradients("gated:inner=minference", plan, KernelKind::automatic), Error);
}

}  // namespace
}  // namespace tessera
