// sla: both branches against their formula in float64, and gradients against central differences of that formula.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>

#include "methods/masks.h"
#include "tessera/gradient.h"

namespace tessera {
namespace {

using test::AttentionCase;
using test::CaseShape;

CaseShape bidirectional(CaseShape shape) {
  shape.causal = false;
  return shape;
}

/// Projection and bias of the linear branch.
struct Side {
  std::int64_t heads;
  std::int64_t dim;
  std::vector<float> projection;
  std::vector<float> bias;

  Side(const Problem& p, bool per_head) : heads(per_head ? p.q_heads : 1), dim(p.value_dim) {
    for (std::int64_t i = 0; i < heads * dim * dim; ++i) {
      projection.push_back(std::sin(static_cast<float>(i) * 0.37F) * 0.5F);
    }
    for (std::int64_t i = 0; i < heads * dim; ++i) bias.push_back(std::cos(static_cast<float>(i) * 0.61F));
  }
  std::vector<SideTensor> tensors() const {
    return {{"projection", view_of(projection.data(), DType::f32, {1, heads, dim, dim})},
            {"bias", view_of(bias.data(), DType::f32, {1, heads, 1, dim})}};
  }
};

/// Inputs of one (sequence, query head) in float64, and which keys each branch reads for every query.
struct HeadCase {
  std::int64_t queries, keys, dim, value_dim;
  double scale;
  std::vector<double> q, k, v, w, b;
  std::vector<std::uint8_t> critical, marked;  ///< [queries][keys]
  bool all = false;                            ///< the linear branch reads every key
  std::string map = "softmax";

  std::vector<double> phi(const double* x) const {
    std::vector<double> y(x, x + dim);
    if (map == "softmax") {
      double sum = 0;
      for (double& e : y) sum += e = std::exp(e);
      for (double& e : y) e /= sum;
    } else {
      for (double& e : y) e = map == "relu" ? std::max(e, 0.0) : (e > 0 ? e + 1 : std::exp(e));
    }
    return y;
  }

  std::vector<double> output(std::int64_t n) const {
    std::vector<double> sparse(static_cast<std::size_t>(value_dim), 0.0);
    std::vector<double> linear(sparse);
    const double* query = q.data() + n * dim;
    const std::vector<double> phi_q = phi(query);
    double sum = 0;
    double denominator = all ? 1e-5 : 0.0;
    for (std::int64_t j = 0; j < keys; ++j) {
      const double* key = k.data() + j * dim;
      const double* value = v.data() + j * value_dim;
      const auto pair = static_cast<std::size_t>(n * keys + j);
      if (critical[pair] != 0) {
        double dot = 0;
        for (std::int64_t d = 0; d < dim; ++d) dot += query[d] * key[d];
        const double p = std::exp(scale * dot);
        sum += p;
        for (std::int64_t d = 0; d < value_dim; ++d) sparse[static_cast<std::size_t>(d)] += p * value[d];
      }
      if (marked[pair] != 0) {
        const std::vector<double> phi_k = phi(key);
        double dot = 0;
        for (std::int64_t d = 0; d < dim; ++d)
          dot += phi_q[static_cast<std::size_t>(d)] * phi_k[static_cast<std::size_t>(d)];
        denominator += dot;
        for (std::int64_t d = 0; d < value_dim; ++d) linear[static_cast<std::size_t>(d)] += dot * value[d];
      }
    }
    std::vector<double> o(static_cast<std::size_t>(value_dim));
    for (std::int64_t d = 0; d < value_dim; ++d) {
      double x = sum > 0 ? sparse[static_cast<std::size_t>(d)] / sum : 0.0;
      for (std::int64_t e = 0; e < value_dim && denominator > 0; ++e) {
        x += linear[static_cast<std::size_t>(e)] / denominator * w[static_cast<std::size_t>(e * value_dim + d)];
      }
      o[static_cast<std::size_t>(d)] = x + b[static_cast<std::size_t>(d)];
    }
    return o;
  }
};

/// A value as the method reads it: tests of gradients give values of their own width.
double value_at(const AttentionCase& c, std::int64_t s, std::int64_t head, std::int64_t key, std::int64_t d) {
  const TensorView& v = c.inputs.v;
  if (c.inputs.pages.used() || c.problem.variable_length()) return c.v(s, head, key, d);
  return load_as_float(v.row(s, head, key), v.dtype, d);
}

/// Classes by definition: tiles ranked by mean query times mean key.
HeadCase head_case(const AttentionCase& c, const Side& side, std::int64_t s, std::int64_t h, std::int64_t tile_q,
                   std::int64_t tile_k, double critical, double negligible, bool all, const std::string& map) {
  const Problem& p = c.problem;
  HeadCase head;
  head.queries = p.q_len_of(s);
  head.keys = p.kv_len_of(s);
  head.dim = p.head_dim;
  head.value_dim = p.value_dim;
  head.scale = p.softmax_scale();
  head.all = all;
  head.map = map;
  for (std::int64_t n = 0; n < head.queries; ++n) {
    for (std::int64_t d = 0; d < head.dim; ++d) head.q.push_back(c.q(s, h, n, d));
  }
  for (std::int64_t j = 0; j < head.keys; ++j) {
    for (std::int64_t d = 0; d < head.dim; ++d) head.k.push_back(c.k(s, h / p.group(), j, d));
    for (std::int64_t d = 0; d < head.value_dim; ++d) head.v.push_back(value_at(c, s, h / p.group(), j, d));
  }
  const std::int64_t own = side.heads == 1 ? 0 : h;
  const std::int64_t square = side.dim * side.dim;
  head.w.assign(side.projection.begin() + own * square, side.projection.begin() + (own + 1) * square);
  head.b.assign(side.bias.begin() + own * side.dim, side.bias.begin() + (own + 1) * side.dim);
  const std::int64_t tiles = (head.keys + tile_k - 1) / tile_k;
  head.critical.assign(static_cast<std::size_t>(head.queries * head.keys), 0);
  head.marked.assign(head.critical.size(), all ? 1 : 0);
  const auto mean = [&](const std::vector<double>& rows, std::int64_t first, std::int64_t last, std::int64_t d) {
    double sum = 0;
    for (std::int64_t i = first; i < last; ++i) sum += rows[static_cast<std::size_t>(i * head.dim + d)];
    return sum / static_cast<double>(last - first);
  };
  for (std::int64_t first = 0; first < head.queries; first += tile_q) {
    const std::int64_t last = std::min(first + tile_q, head.queries);
    std::vector<std::pair<double, std::int64_t>> ranked;
    for (std::int64_t j = 0; j < tiles; ++j) {
      double score = 0;
      for (std::int64_t d = 0; d < head.dim; ++d) {
        score += mean(head.q, first, last, d) * mean(head.k, j * tile_k, std::min((j + 1) * tile_k, head.keys), d);
      }
      ranked.emplace_back(-score, j);
    }
    std::sort(ranked.begin(), ranked.end());
    const auto best = std::max<std::int64_t>(1, static_cast<std::int64_t>(critical * static_cast<double>(tiles)));
    const auto worst = std::min(tiles - best, static_cast<std::int64_t>(negligible * static_cast<double>(tiles)));
    for (std::int64_t i = 0; i < tiles; ++i) {
      const std::int64_t j = ranked[static_cast<std::size_t>(i)].second;
      for (std::int64_t n = first; n < last; ++n) {
        for (std::int64_t key = j * tile_k; key < std::min((j + 1) * tile_k, head.keys); ++key) {
          const auto pair = static_cast<std::size_t>(n * head.keys + key);
          if (i < best) head.critical[pair] = 1;
          if (!all && i >= best && i < tiles - worst) head.marked[pair] = 1;
        }
      }
    }
  }
  return head;
}

struct Spec {
  std::int64_t tile_q, tile_k;
  double critical, negligible;
  bool all;
  std::string map;

  std::string text() const {
    return "sla:block_q=" + std::to_string(tile_q) + ",block_k=" + std::to_string(tile_k) +
           ",critical=" + std::to_string(critical) + ",negligible=" + std::to_string(negligible) +
           ",scope=" + (all ? "all" : "marginal") + ",map=" + map;
  }
};

const std::vector<Spec> kSpecs{{16, 16, 0.3, 0.2, false, "softmax"},
                               {32, 16, 0.2, 0, false, "elu"},
                               {16, 32, 0.5, 0.5, false, "softmax"},
                               {16, 8, 0.1, 0.1, true, "relu"},
                               {64, 64, 0.05, 0.1, false, "softmax"}};

/// Output of the method, [B, Hq, Nq, Dv] in float.
struct Answer {
  std::vector<float> o;
  MutableTensorView view;
  Plan plan;

  Answer(const std::string& spec, const AttentionCase& c, const std::vector<SideTensor>& side, int threads = 0) {
    const Problem& p = c.problem;
    const std::int64_t batch = p.variable_length() ? 1 : p.batch;
    o.resize(static_cast<std::size_t>(batch * p.q_heads * p.q_len * p.value_dim));
    view = mutable_view_of(o.data(), DType::f32, {batch, p.q_heads, p.q_len, p.value_dim});
    AttentionInputs inputs = c.inputs;
    inputs.side = side;
    PlanContext context;
    context.run.threads = threads;
    make_method(spec)->attend(p, inputs, {view, {}}, context, &plan);
  }
};

class SlaShapes : public testing::TestWithParam<CaseShape> {};

TEST_P(SlaShapes, IsTheFormula) {
  const AttentionCase c(bidirectional(GetParam()));
  const Problem& p = c.problem;
  const double tolerance = c.shape().dtype == DType::f32 ? 2e-4 : 3e-2;
  for (const Spec& spec : kSpecs) {
    for (const bool per_head : {false, true}) {
      const Side side(p, per_head);
      const Answer answer(spec.text(), c, side.tensors());
      for (std::int64_t s = 0; s < p.batch; ++s) {
        for (std::int64_t h = 0; h < p.q_heads; ++h) {
          const HeadCase head =
              head_case(c, side, s, h, spec.tile_q, spec.tile_k, spec.critical, spec.negligible, spec.all, spec.map);
          if (head.keys == 0) continue;
          for (std::int64_t n = 0; n < head.queries; n += 3) {
            const std::vector<double> expected = head.output(n);
            const std::byte* row = answer.view.row(p.tensor_batch_of(s), h, p.q_begin_of(s) + n);
            for (std::int64_t d = 0; d < p.value_dim; ++d) {
              ASSERT_NEAR(load_as_float(row, DType::f32, d), expected[static_cast<std::size_t>(d)], tolerance)
                  << spec.text() << " " << s << " " << h << " " << n;
            }
          }
        }
      }
    }
  }
}
INSTANTIATE_TEST_SUITE_P(Shapes, SlaShapes, testing::ValuesIn(test::all_shapes()),
                         [](const auto& shape) { return shape.param.name; });

TEST(Sla, WithoutProjectionItIsItsSparseBranch) {
  const AttentionCase c(bidirectional({.name = "plain", .q_len = 100, .kv_len = 130}));
  const Answer method("sla:block_q=16,block_k=16,critical=0.3", c, {});
  std::vector<float> o(method.o.size());
  run(method.plan, c.inputs, {mutable_view_of(o.data(), DType::f32, method.view.shape), {}}, {});
  EXPECT_EQ(method.o, o);
  EXPECT_LT(statistics(method.plan).density, 0.4);
}

TEST(Sla, AllCriticalIsDenseAndHasNoLinearBranch) {
  const AttentionCase c(bidirectional({.name = "plain", .q_len = 70, .kv_len = 90}));
  Side side(c.problem, false);
  side.bias.assign(side.bias.size(), 0.0F);
  const Answer method("sla:block_q=16,block_k=16,critical=1,negligible=0", c, side.tensors());
  const Answer dense("dense", c, {});
  for (std::size_t i = 0; i < dense.o.size(); ++i) ASSERT_NEAR(method.o[i], dense.o[i], 1e-5);
}

/// A small case of gradients: shapes around the tiles of the methods and around the 16 columns of their products.
struct GradientCase {
  Spec spec;
  CaseShape shape;
  std::int64_t value_dim = 8;
};

class SlaGradients : public testing::TestWithParam<GradientCase> {};

TEST_P(SlaGradients, AreThoseOfTheFormula) {
  const Spec& spec = GetParam().spec;
  AttentionCase c(bidirectional(GetParam().shape));
  const Problem& p = c.problem;
  c.problem.value_dim = GetParam().value_dim;
  std::vector<float> values(static_cast<std::size_t>(p.batch * p.kv_heads * p.kv_len * p.value_dim));
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = std::sin(static_cast<float>(i) * 0.71F);
  c.inputs.v = view_of(values.data(), DType::f32, {p.batch, p.kv_heads, p.kv_len, p.value_dim});
  for (const bool per_head : {false, true}) {
    const Side side(p, per_head);
    AttentionInputs inputs = c.inputs;
    inputs.side = side.tensors();
    const auto method = make_method(spec.text());
    const auto size = [](const std::array<std::int64_t, 4>& s) {
      return static_cast<std::size_t>(s[0] * s[1] * s[2] * s[3]);
    };
    const std::array<std::int64_t, 4> o_shape{p.batch, p.q_heads, p.q_len, p.value_dim};
    std::vector<float> o(size(o_shape)), lse(size(o_shape) / static_cast<std::size_t>(p.value_dim)), d_o(o.size());
    for (std::size_t i = 0; i < d_o.size(); ++i) d_o[i] = std::sin(static_cast<float>(i) * 1.3F);
    const auto o_view = mutable_view_of(o.data(), DType::f32, o_shape);
    method->attend(p, inputs, {o_view, lse}, {});
    std::vector<float> d_q(size(inputs.q.shape)), d_k(size(inputs.k.shape)), d_v(size(inputs.v.shape)),
        d_w(side.projection.size()), d_b(side.bias.size());
    Gradients gradients;
    gradients.d_q = mutable_view_of(d_q.data(), DType::f32, inputs.q.shape);
    gradients.d_k = mutable_view_of(d_k.data(), DType::f32, inputs.k.shape);
    gradients.d_v = mutable_view_of(d_v.data(), DType::f32, inputs.v.shape);
    gradients.side = {{"projection", mutable_view_of(d_w.data(), DType::f32, {1, side.heads, side.dim, side.dim})},
                      {"bias", mutable_view_of(d_b.data(), DType::f32, {1, side.heads, 1, side.dim})}};
    SavedForward saved{o_view, lse, view_of(d_o.data(), DType::f32, o_shape), {}};
    method->backward(p, inputs, saved, gradients, {});
    // Without an LSE the sparse branch is run again.
    const std::vector<float> from_saved = d_q;
    saved.lse = {};
    method->backward(p, inputs, saved, gradients, {});
    for (std::size_t i = 0; i < d_q.size(); ++i) ASSERT_NEAR(d_q[i], from_saved[i], 1e-4) << spec.text() << " " << i;
    d_q = from_saved;

    // Differences of the loss sum(dO * O) of one head; keys, values and shared weights add up over heads.
    std::vector<double> n_q(d_q.size()), n_k(d_k.size()), n_v(d_v.size()), n_w(d_w.size()), n_b(d_b.size());
    for (std::int64_t s = 0; s < p.batch; ++s) {
      for (std::int64_t h = 0; h < p.q_heads; ++h) {
        HeadCase head =
            head_case(c, side, s, h, spec.tile_q, spec.tile_k, spec.critical, spec.negligible, spec.all, spec.map);
        const auto loss = [&] {
          double sum = 0;
          for (std::int64_t n = 0; n < head.queries; ++n) {
            const auto out = head.output(n);
            for (std::size_t d = 0; d < out.size(); ++d) {
              sum += out[d] * d_o[static_cast<std::size_t>(((s * p.q_heads + h) * p.q_len + n) * p.value_dim) + d];
            }
          }
          return sum;
        };
        const auto differences = [&](std::vector<double>& x, std::vector<double>& gradient, std::int64_t at) {
          for (std::size_t i = 0; i < x.size(); ++i) {
            const double before = x[i];
            x[i] = before + 1e-5;
            const double above = loss();
            x[i] = before - 1e-5;
            gradient[static_cast<std::size_t>(at) + i] += (above - loss()) / 2e-5;
            x[i] = before;
          }
        };
        const std::int64_t kv = s * p.kv_heads + h / p.group();
        const std::int64_t own = side.heads == 1 ? 0 : h;
        differences(head.q, n_q, (s * p.q_heads + h) * p.q_len * p.head_dim);
        differences(head.k, n_k, kv * p.kv_len * p.head_dim);
        differences(head.v, n_v, kv * p.kv_len * p.value_dim);
        differences(head.w, n_w, own * side.dim * side.dim);
        differences(head.b, n_b, own * side.dim);
      }
    }
    const auto expect_near = [&](const std::vector<float>& actual, const std::vector<double>& expected,
                                 const std::string& what) {
      for (std::size_t i = 0; i < actual.size(); ++i) {
        ASSERT_NEAR(actual[i], expected[i], 2e-3 * (1 + std::fabs(expected[i])))
            << spec.text() << " " << what << " " << i;
      }
    };
    expect_near(d_q, n_q, "d_q");
    expect_near(d_k, n_k, "d_k");
    expect_near(d_v, n_v, "d_v");
    expect_near(d_w, n_w, "d_projection");
    expect_near(d_b, n_b, "d_bias");
  }
}
INSTANTIATE_TEST_SUITE_P(
    Shapes, SlaGradients,
    testing::Values(
        GradientCase{
            {4, 4, 0.34, 0.17, false, "softmax"},
            {.name = "groups", .batch = 2, .q_heads = 4, .kv_heads = 2, .q_len = 10, .kv_len = 23, .head_dim = 6}},
        GradientCase{
            {4, 3, 0.25, 0, false, "elu"},
            {.name = "elu", .batch = 2, .q_heads = 4, .kv_heads = 2, .q_len = 10, .kv_len = 23, .head_dim = 6}},
        GradientCase{
            {5, 4, 0.25, 0, true, "softmax"},
            {.name = "all_keys", .batch = 2, .q_heads = 4, .kv_heads = 2, .q_len = 10, .kv_len = 23, .head_dim = 6}},
        GradientCase{{3, 5, 0.2, 0.3, false, "relu"},
                     {.name = "relu", .q_heads = 2, .kv_heads = 2, .q_len = 7, .kv_len = 26, .head_dim = 17},
                     5},
        GradientCase{{4, 4, 0.2, 0.1, false, "softmax"},
                     {.name = "wide_values", .q_heads = 2, .kv_heads = 1, .q_len = 9, .kv_len = 17, .head_dim = 5},
                     35},
        GradientCase{{64, 4, 0.3, 0, false, "softmax"},
                     {.name = "one_query", .q_heads = 3, .kv_heads = 1, .q_len = 1, .kv_len = 15, .head_dim = 16},
                     3},
        GradientCase{{4, 64, 0.3, 0, false, "softmax"},
                     {.name = "one_key_tile", .q_heads = 1, .kv_heads = 1, .q_len = 6, .kv_len = 9, .head_dim = 4},
                     4},
        // More query tiles than have their sums of states at a time.
        GradientCase{{1, 2, 0.2, 0.2, false, "softmax"},
                     {.name = "many_tiles", .q_heads = 2, .kv_heads = 1, .q_len = 131, .kv_len = 9, .head_dim = 3},
                     2}),
    [](const auto& one) { return one.param.shape.name; });

TEST(Sla, WithoutProjectionTheGradientsAreThoseOfItsSparseBranch) {
  const AttentionCase c(bidirectional({.name = "plain", .q_heads = 4, .kv_heads = 2, .q_len = 70, .kv_len = 90}));
  const Problem& p = c.problem;
  const auto method = make_method("sla:block_q=16,block_k=16,critical=0.3");
  const std::array<std::int64_t, 4> o_shape{1, p.q_heads, p.q_len, p.value_dim};
  std::vector<float> o(static_cast<std::size_t>(p.q_heads * p.q_len * p.value_dim));
  std::vector<float> lse(static_cast<std::size_t>(p.q_heads * p.q_len));
  std::vector<float> d_o(o.size());
  for (std::size_t i = 0; i < d_o.size(); ++i) d_o[i] = std::sin(static_cast<float>(i) * 1.3F);
  Plan plan;
  method->attend(p, c.inputs, {mutable_view_of(o.data(), DType::f32, o_shape), lse}, {}, &plan);
  SavedForward saved{view_of(o.data(), DType::f32, o_shape), lse, view_of(d_o.data(), DType::f32, o_shape), {}};
  const auto values = [&](const auto& backward) {
    std::vector<float> all(static_cast<std::size_t>(p.q_heads * p.q_len * p.head_dim +
                                                    p.kv_heads * p.kv_len * (p.head_dim + p.value_dim)));
    Gradients gradients;
    float* at = all.data();
    gradients.d_q = mutable_view_of(at, DType::f32, {1, p.q_heads, p.q_len, p.head_dim});
    at += p.q_heads * p.q_len * p.head_dim;
    gradients.d_k = mutable_view_of(at, DType::f32, {1, p.kv_heads, p.kv_len, p.head_dim});
    at += p.kv_heads * p.kv_len * p.head_dim;
    gradients.d_v = mutable_view_of(at, DType::f32, {1, p.kv_heads, p.kv_len, p.value_dim});
    backward(gradients);
    return all;
  };
  const auto expected = values([&](const Gradients& g) { run_backward(plan, c.inputs, saved, g); });
  EXPECT_EQ(values([&](const Gradients& g) { method->backward(p, c.inputs, saved, g, {}); }), expected);
  // A bias of zero brings in the linear branch, which changes nothing.
  std::vector<float> bias(static_cast<std::size_t>(p.value_dim), 0.0F);
  AttentionInputs with_bias = c.inputs;
  with_bias.side = {{"bias", view_of(bias.data(), DType::f32, {1, 1, 1, p.value_dim})}};
  const auto with_branch = values([&](const Gradients& g) { method->backward(p, with_bias, saved, g, {}); });
  for (std::size_t i = 0; i < expected.size(); ++i) ASSERT_NEAR(with_branch[i], expected[i], 1e-5) << i;
}

TEST(Sla, DoesNotDependOnThreads) {
  const AttentionCase c(bidirectional({.name = "plain", .q_heads = 4, .kv_heads = 2, .q_len = 200, .kv_len = 300}));
  const Side side(c.problem, true);
  EXPECT_EQ(Answer("sla:block_q=16,block_k=16", c, side.tensors(), 1).o,
            Answer("sla:block_q=16,block_k=16", c, side.tensors(), 3).o);
}

/// All gradients of a case with its projection, in `dtype`, as floats.
std::vector<std::vector<float>> gradients_of(const AttentionCase& c, const Side& side, DType dtype, int threads) {
  const Problem& p = c.problem;
  AttentionInputs inputs = c.inputs;
  inputs.side = side.tensors();
  PlanContext context;
  context.run.threads = threads;
  const auto method = make_method("sla:block_q=16,block_k=16,critical=0.2");
  const std::array<std::int64_t, 4> o_shape{1, p.q_heads, p.q_len, p.value_dim};
  std::vector<float> o(static_cast<std::size_t>(p.q_heads * p.q_len * p.value_dim));
  std::vector<float> lse(static_cast<std::size_t>(p.q_heads * p.q_len));
  std::vector<float> d_o(o.size());
  for (std::size_t i = 0; i < d_o.size(); ++i) d_o[i] = std::sin(static_cast<float>(i) * 1.3F);
  method->attend(p, inputs, {mutable_view_of(o.data(), DType::f32, o_shape), lse}, context);
  std::vector<std::vector<std::byte>> memory;
  const auto tensor = [&](const std::array<std::int64_t, 4>& shape) {
    memory.emplace_back(static_cast<std::size_t>(shape[0] * shape[1] * shape[2] * shape[3]) * size_of(dtype));
    return mutable_view_of(memory.back().data(), dtype, shape);
  };
  Gradients gradients;
  gradients.d_q = tensor(inputs.q.shape);
  gradients.d_k = tensor(inputs.k.shape);
  gradients.d_v = tensor(inputs.v.shape);
  for (const SideTensor& of : inputs.side) gradients.side.push_back({of.name, tensor(of.view.shape)});
  const SavedForward saved{view_of(o.data(), DType::f32, o_shape), lse, view_of(d_o.data(), DType::f32, o_shape), {}};
  method->backward(p, inputs, saved, gradients, context);
  std::vector<std::vector<float>> numbers;
  for (const std::vector<std::byte>& bytes : memory) {
    std::vector<float>& floats = numbers.emplace_back(bytes.size() / size_of(dtype));
    for (std::size_t i = 0; i < floats.size(); ++i) {
      floats[i] = load_as_float(bytes.data(), dtype, static_cast<std::int64_t>(i));
    }
  }
  return numbers;
}

TEST(Sla, GradientsDoNotDependOnThreads) {
  const AttentionCase c(bidirectional({.name = "plain", .q_heads = 4, .kv_heads = 2, .q_len = 200, .kv_len = 300}));
  for (const bool per_head : {false, true}) {
    const Side side(c.problem, per_head);
    EXPECT_EQ(gradients_of(c, side, DType::f32, 1), gradients_of(c, side, DType::f32, 3));
  }
}

TEST(Sla, GradientsInBfloat16AreRoundedOnce) {
  const AttentionCase c(bidirectional({.name = "plain", .q_heads = 4, .kv_heads = 2, .q_len = 70, .kv_len = 90}));
  const Side side(c.problem, false);
  const auto exact = gradients_of(c, side, DType::f32, 2);
  const auto rounded = gradients_of(c, side, DType::bf16, 2);
  for (std::size_t t = 0; t < exact.size(); ++t) {
    for (std::size_t i = 0; i < exact[t].size(); ++i) {
      ASSERT_LE(std::fabs(rounded[t][i] - exact[t][i]), std::fabs(exact[t][i]) / 256) << t << " " << i;
    }
  }
}

TEST(Sla, RefusesWhatItIsNotDefinedFor) {
  const AttentionCase causal({.name = "causal", .q_len = 30, .kv_len = 30});
  EXPECT_THROW(Answer("sla", causal, {}), Error);
  EXPECT_THROW(make_method("sla:critical=0.7,negligible=0.5"), Error);
  const AttentionCase c(bidirectional({.name = "plain", .q_len = 30, .kv_len = 30}));
  std::vector<SideTensor> wrong = Side(c.problem, false).tensors();
  wrong[0].view.shape[2] -= 1;
  EXPECT_THROW(Answer("sla", c, wrong), Error);
}

}  // namespace
}  // namespace tessera
