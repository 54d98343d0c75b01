// softplus-reweight against its formula in float64.
#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <random>

#include "methods/masks.h"

namespace tessera {
namespace {

using test::AttentionCase;
using test::CaseShape;

struct Formula {
  bool reweight = true;
  double offset = 1;
  int power = 3;
  bool length_scale = true;
};

/// Weights of one row by definition; all 0 where nothing is visible.
std::vector<double> weights_of(const AttentionCase& c, std::int64_t s, std::int64_t h, std::int64_t n,
                               const Formula& f) {
  const Problem& p = c.problem;
  const auto keys = static_cast<std::size_t>(p.kv_len_of(s));
  std::vector<double> a(keys, 0.0);
  double visible = 0;
  for (std::size_t j = 0; j < keys; ++j) visible += c.allowed(s, n, static_cast<std::int64_t>(j)) ? 1 : 0;
  double sum = 0;
  for (std::size_t j = 0; j < keys; ++j) {
    const auto key = static_cast<std::int64_t>(j);
    if (!c.allowed(s, n, key)) continue;
    double dot = 0;
    for (std::int64_t d = 0; d < p.head_dim; ++d) {
      dot += static_cast<double>(c.q(s, h, n, d)) * c.k(s, h / p.group(), key, d);
    }
    const auto dim = static_cast<double>(p.head_dim);
    const double scale = f.length_scale ? std::log(dim) * std::log(visible) / std::sqrt(dim) : 1 / std::sqrt(dim);
    const double z = scale * dot;
    a[j] = std::max(z, 0.0) + std::log1p(std::exp(-std::fabs(z)));
    sum += a[j];
  }
  for (double& x : a) x = sum > 0 ? x / sum : 0.0;
  if (!f.reweight || sum == 0) return a;
  std::vector<double> r(keys, 0.0);
  double left = 0;
  for (std::size_t j = 0; j < keys; ++j) {
    r[j] = std::pow(std::max(0.0, visible * a[j] - f.offset), f.power);
    left += r[j];
  }
  if (left < 1e-6) return a;
  for (double& x : r) x /= left;
  return r;
}

void expect_formula(const std::string& spec, const AttentionCase& c, const Formula& f, double tolerance = 2e-4) {
  const Problem& p = c.problem;
  const std::int64_t batch = p.variable_length() ? 1 : p.batch;
  std::vector<float> o(static_cast<std::size_t>(batch * p.q_heads * p.q_len * p.value_dim));
  const auto view = mutable_view_of(o.data(), DType::f32, {batch, p.q_heads, p.q_len, p.value_dim});
  make_method(spec)->attend(p, c.inputs, {view, {}}, {});
  for (std::int64_t s = 0; s < p.batch; ++s) {
    for (std::int64_t h = 0; h < p.q_heads; ++h) {
      for (std::int64_t n = 0; n < p.q_len_of(s); ++n) {
        const auto w = weights_of(c, s, h, n, f);
        for (std::int64_t d = 0; d < p.value_dim; ++d) {
          double expected = 0;
          for (std::size_t j = 0; j < w.size(); ++j) {
            expected += w[j] * c.v(s, h / p.group(), static_cast<std::int64_t>(j), d);
          }
          const std::byte* row = view.row(p.tensor_batch_of(s), h, p.q_begin_of(s) + n);
          ASSERT_NEAR(load_as_float(row, DType::f32, d), expected, tolerance)
              << spec << " " << s << " " << h << " " << n;
        }
      }
    }
  }
}

class SoftplusReweightShapes : public testing::TestWithParam<CaseShape> {};

TEST_P(SoftplusReweightShapes, IsTheFormula) {
  const AttentionCase c(GetParam());
  const double tolerance = c.shape().dtype == DType::f32 ? 1e-3 : 3e-2;
  expect_formula("softplus-reweight:reweight=false", c, {.reweight = false}, tolerance);
  expect_formula("softplus-reweight:reweight=false,length_scale=false", c, {.reweight = false, .length_scale = false},
                 tolerance);
  expect_formula("softplus-reweight", c, {}, tolerance);
  expect_formula("softplus-reweight:offset=0.5,power=5", c, {.offset = 0.5, .power = 5}, tolerance);
}
INSTANTIATE_TEST_SUITE_P(Shapes, SoftplusReweightShapes, testing::ValuesIn(test::all_shapes()),
                         [](const auto& shape) { return shape.param.name; });

TEST(SoftplusReweight, PowerOneWithoutOffsetIsTheFirstPass) {
  const AttentionCase c({.name = "plain", .q_len = 40, .kv_len = 90});
  expect_formula("softplus-reweight:offset=0,power=1", c, {.reweight = false});
}

TEST(SoftplusReweight, EqualScoresGiveEqualWeights) {
  AttentionCase c({.name = "equal", .q_len = 20, .kv_len = 50});
  for (std::int64_t h = 0; h < c.problem.q_heads; ++h) {
    for (std::int64_t n = 0; n < 20; ++n) {
      for (std::int64_t d = 0; d < 16; ++d) c.set_q(0, h, n, d, 0);
    }
  }
  expect_formula("softplus-reweight", c, {.reweight = false});
}

TEST(SoftplusReweight, WeightsThatVanishGiveFiniteOutputs) {
  // Every score of query n is about -2n: the weights fall through the smallest floats to nothing.
  AttentionCase c({.name = "low", .q_heads = 1, .q_len = 80, .kv_len = 80});
  for (std::int64_t n = 0; n < 80; ++n) {
    for (std::int64_t d = 0; d < 16; ++d) {
      c.set_q(0, 0, n, d, d == 0 ? -8.0F * static_cast<float>(n) : 0.0F);
      c.set_k(0, 0, n, d, d == 0 ? 1.0F + 0.001F * static_cast<float>(n) : 0.0F);
    }
  }
  for (const std::string spec :
       {"softplus-reweight:length_scale=false", "softplus-reweight:length_scale=false,reweight=false",
        "softplus-reweight:length_scale=false,offset=0"}) {
    std::vector<float> o(80 * 8);
    std::vector<float> lse(80);
    make_method(spec)->attend(c.problem, c.inputs, {mutable_view_of(o.data(), DType::f32, {1, 1, 80, 8}), lse}, {});
    for (const float x : o) ASSERT_TRUE(std::isfinite(x)) << spec;
    EXPECT_TRUE(std::isinf(lse[79])) << spec << ": nothing is left of the last row";
    EXPECT_EQ(o[79 * 8], 0) << spec;
    EXPECT_NE(o[20 * 8], 0) << spec;
  }
}

TEST(SoftplusReweight, RefusesBadParameters) {
  EXPECT_THROW(make_method("softplus-reweight:power=0"), Error);
  EXPECT_THROW(make_method("softplus-reweight:offset=-1"), Error);
  const AttentionCase c({.name = "plain", .q_len = 4, .kv_len = 9});
  AttentionInputs inputs = c.inputs;
  inputs.modifiers.weights = RowWeights::softplus;
  std::vector<float> o(2 * 4 * 16);
  EXPECT_THROW(make_method("softplus-reweight")
                   ->attend(c.problem, inputs, {mutable_view_of(o.data(), DType::f32, {1, 2, 4, 16}), {}}, {}),
               Error);
}

/// One case as float64 numbers, the loss (outputs and LSEs times their gradients) by definition, and the gradients by
/// the method.
struct SoftplusGradient {
  using Numbers = std::map<std::string, std::vector<double>>;

  explicit SoftplusGradient(const CaseShape& shape)
      : c(shape), batch(c.problem.variable_length() ? 1 : c.problem.batch) {
    const Problem& p = c.problem;
    d_o.resize(static_cast<std::size_t>(batch * p.q_heads * p.q_len * p.value_dim));
    for (std::size_t i = 0; i < d_o.size(); ++i) d_o[i] = std::cos(static_cast<float>(i) * 0.37F);
    d_lse.resize(d_o.size() / static_cast<std::size_t>(p.value_dim));
    for (std::size_t i = 0; i < d_lse.size(); ++i) d_lse[i] = std::sin(static_cast<float>(i) * 0.91F);
  }

  /// Queries of every third row become 0: their scores are equal, so that the offset leaves nothing.
  void equal_rows() {
    for (std::int64_t n = 0; n < c.problem.q_len; n += 3) {
      for (std::int64_t d = 0; d < c.problem.head_dim; ++d) c.set_q(0, 0, n, d, 0);
    }
  }

  Numbers numbers() const {
    Numbers x;
    for (const auto& [name, view] :
         {std::pair{"q", c.inputs.q}, std::pair{"k", c.inputs.k}, std::pair{"v", c.inputs.v}}) {
      for (std::int64_t b = 0; b < view.batch(); ++b) {
        for (std::int64_t h = 0; h < view.heads(); ++h) {
          for (std::int64_t n = 0; n < view.tokens(); ++n) {
            for (std::int64_t d = 0; d < view.dim(); ++d) {
              x[name].push_back(load_as_float(view.row(b, h, n), view.dtype, d));
            }
          }
        }
      }
    }
    return x;
  }

  double loss(const Numbers& x, const Formula& f) const {
    const Problem& p = c.problem;
    double total = 0;
    for (std::int64_t s = 0; s < p.batch; ++s) {
      for (std::int64_t h = 0; h < p.q_heads; ++h) {
        for (std::int64_t n = 0; n < p.q_len_of(s); ++n) {
          const std::int64_t row = (p.tensor_batch_of(s) * p.q_heads + h) * p.q_len + p.q_begin_of(s) + n;
          const std::int64_t first = (p.tensor_batch_of(s) * p.kv_heads + h / p.group()) * p.kv_len + p.kv_begin_of(s);
          std::int64_t visible = 0;
          while (visible < p.kv_len_of(s) && c.allowed(s, n, visible)) ++visible;
          if (visible == 0) continue;
          const auto dim = static_cast<double>(p.head_dim);
          const auto count = static_cast<double>(visible);
          const double scale = (f.length_scale ? std::log(dim) * std::log(std::max(count, 2.0)) : 1.0) / std::sqrt(dim);
          std::vector<double> a;
          double sum = 0;
          for (std::int64_t j = 0; j < visible; ++j) {
            double z = 0;
            for (std::int64_t d = 0; d < p.head_dim; ++d) {
              z += scale * x.at("q")[row * p.head_dim + d] * x.at("k")[(first + j) * p.head_dim + d];
            }
            a.push_back(std::max(z, 0.0) + std::log1p(std::exp(-std::fabs(z))));
            sum += a.back();
          }
          std::vector<double> w;
          double left = 0;
          for (const double value : a) {
            w.push_back(std::pow(std::max(0.0, count * value / sum - f.offset), f.power));
            left += w.back();
          }
          if (!f.reweight || left < 1e-6) {
            w = a;
            left = sum;
          }
          for (std::int64_t j = 0; j < visible; ++j) {
            for (std::int64_t d = 0; d < p.value_dim; ++d) {
              total += w[j] / left * x.at("v")[(first + j) * p.value_dim + d] * d_o[row * p.value_dim + d];
            }
          }
          total += std::log(sum) * d_lse[row];
        }
      }
    }
    return total;
  }

  std::map<std::string, std::vector<float>> gradients(const std::string& spec, KernelKind kernel,
                                                      int threads = 0) const {
    const Problem& p = c.problem;
    const std::array<std::int64_t, 4> shape{batch, p.q_heads, p.q_len, p.value_dim};
    std::vector<float> o(d_o.size());
    std::vector<float> lse(d_lse.size());
    const auto method = make_method(spec);
    PlanContext context;
    context.run.kernel = kernel;
    context.run.threads = threads;
    method->attend(p, c.inputs, {mutable_view_of(o.data(), DType::f32, shape), lse}, context);
    std::map<std::string, std::vector<float>> values;
    for (const auto& [name, tensor] : numbers()) values[name].assign(tensor.size(), 99.0F);
    SavedForward saved;
    saved.o = view_of(o.data(), DType::f32, shape);
    saved.d_o = view_of(d_o.data(), DType::f32, shape);
    saved.lse = lse;
    saved.d_lse = d_lse;
    Gradients gradients;
    gradients.d_q = mutable_view_of(values["q"].data(), DType::f32, c.inputs.q.shape);
    gradients.d_k = mutable_view_of(values["k"].data(), DType::f32, c.inputs.k.shape);
    gradients.d_v = mutable_view_of(values["v"].data(), DType::f32, c.inputs.v.shape);
    method->backward(p, c.inputs, saved, gradients, context);
    return values;
  }

  void check(const std::string& parameters, const Formula& f) const {
    const std::string spec = "softplus-reweight:" + parameters;
    SCOPED_TRACE(spec + " " + c.shape().name);
    const auto exact = gradients(spec, KernelKind::reference);
    const auto fast = gradients(spec, KernelKind::automatic);
    Numbers x = numbers();
    std::mt19937 random(5);
    for (const auto& [name, actual] : exact) {
      for (int sample = 0; sample < 16; ++sample) {
        const std::size_t i = sample < 6 ? static_cast<std::size_t>(sample) : random() % actual.size();
        double& value = x.at(name)[i];
        const double kept = value;
        value = kept + 1e-6;
        const double above = loss(x, f);
        value = kept - 1e-6;
        const double expected = (above - loss(x, f)) / 2e-6;
        value = kept;
        // The sums and factors between the passes are floats.
        ASSERT_NEAR(actual[i], expected, 1e-4 * (1 + std::fabs(expected))) << name << " " << i;
        ASSERT_NEAR(fast.at(name)[i], expected, 5e-4 * (1 + std::fabs(expected))) << name << " " << i;
      }
    }
  }

  AttentionCase c;
  std::int64_t batch;
  std::vector<float> d_o;
  std::vector<float> d_lse;
};

TEST(SoftplusReweight, GradientsMatchCentralDifferences) {
  for (const CaseShape& shape : {CaseShape{.name = "grouped", .q_heads = 4, .kv_heads = 2, .q_len = 19, .kv_len = 33},
                                 CaseShape{.name = "one", .q_len = 1, .kv_len = 1},
                                 CaseShape{.name = "batch", .batch = 2, .q_len = 17, .kv_len = 17, .causal = false},
                                 CaseShape{.name = "varlen", .q_lens = {9, 0, 3}, .kv_lens = {20, 4, 3}}}) {
    const SoftplusGradient g(shape);
    g.check("offset=1", {});
    g.check("reweight=false", {.reweight = false});
    g.check("reweight=false,length_scale=false", {.reweight = false, .length_scale = false});
    g.check("offset=0.5,power=5", {.offset = 0.5, .power = 5});
    g.check("offset=0.25,power=1,length_scale=false", {.offset = 0.25, .power = 1, .length_scale = false});
  }
}

TEST(SoftplusReweight, RowsThatKeepTheFirstWeightsHaveTheirGradient) {
  SoftplusGradient g({.name = "equal", .q_heads = 2, .kv_heads = 1, .q_len = 13, .kv_len = 21});
  g.equal_rows();
  g.check("offset=1", {});
  const auto gradients = g.gradients("softplus-reweight", KernelKind::automatic);
  double size = 0;
  for (std::size_t d = 0; d < 16; ++d) size += std::fabs(gradients.at("q")[d]);
  EXPECT_GT(size, 0.01);  // row 0 of head 0 has equal scores, and moves all the same
}

TEST(SoftplusReweight, GradientsDoNotDependOnThreads) {
  const SoftplusGradient g({.name = "threads", .q_heads = 4, .kv_heads = 2, .q_len = 150, .kv_len = 150});
  EXPECT_EQ(g.gradients("softplus-reweight", KernelKind::automatic, 1),
            g.gradients("softplus-reweight", KernelKind::automatic, 3));
}

}  // namespace
}  // namespace tessera
