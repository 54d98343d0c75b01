// softplus-reweight against its formula in float64.
#include <gtest/gtest.h>

#include <cmath>

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

}  // namespace
}  // namespace tessera
