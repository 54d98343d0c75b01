// Gradients of rows that are no softmax and of scaled queries: the float64 backward pass against central differences of
// the float64 forward pass, and every instruction set against the float64 backward pass.
#include <gtest/gtest.h>

#include "kernels/kernel_case.h"
#include "kernels/reference/row.h"

namespace tessera::testing {
namespace {

/// A call with row weights and all gradients of it.
struct WeightsCase {
  WeightsCase(unsigned seed, RowWeights weights, std::int32_t power, DType dtype, std::int64_t tile_q)
      : random(seed), options(options_of(dtype)), c(random, plan_of(tile_q), options) {
    const Problem& p = c.plan.problem;
    std::uniform_real_distribution<float> uniform(0.3F, 1.5F);
    for (std::int64_t n = 0; n < p.q_len; ++n) query_scale.push_back(uniform(random) * (n % 3 == 0 ? -1.0F : 1.0F));
    const auto rows = static_cast<std::size_t>(p.batch * p.q_heads * p.q_len);
    for (std::size_t row = 0; row < rows; ++row) factors.push_back(uniform(random));
    Modifiers& m = c.inputs.modifiers;
    m.query_scale = query_scale;
    m.weights = weights;
    if (weights == RowWeights::reweighted) {
      m.weight_factors = factors;
      m.weight_offset = 0.35F;
      m.weight_power = power;
    }
    std::normal_distribution<float> normal;
    d_o.resize(rows * static_cast<std::size_t>(p.value_dim));
    for (float& x : d_o) x = bf16_to_float(float_to_bf16(normal(random)));
    for (std::size_t row = 0; row < rows; ++row) d_lse.push_back(normal(random));
    d_o_narrow.resize(d_o.size());
    for (std::size_t i = 0; i < d_o.size(); ++i) d_o_narrow[i] = float_to_bf16(d_o[i]);
  }

  static CaseOptions options_of(DType dtype) {
    CaseOptions options;
    options.head_dim = 24;
    options.value_dim = 18;
    options.dtype = dtype;
    options.output = DType::f32;
    return options;
  }
  static Plan plan_of(std::int64_t tile_q) {
    Problem p;
    p.batch = 2;
    p.q_heads = 4;
    p.kv_heads = 2;
    p.q_len = 21;
    p.kv_len = 53;
    p.head_dim = 24;
    p.value_dim = 18;
    p.causal = true;
    PlanBuilder builder(p, tile_q, 16, 2, 2);
    for (std::int64_t block = 0; block < builder.blocks(); ++block) {
      for (std::int64_t tile = 0; tile < builder.query_tiles(block); ++tile) {
        const std::int64_t last = std::min(p.kv_len - p.q_len + (tile + 1) * tile_q, p.kv_len) - 1;
        builder.tiles(0, last / 16 + 1, EntryMask::band, 0);
        builder.end_row();
      }
    }
    return std::move(builder).finish();
  }

  struct Forward {
    std::vector<float> o;
    std::vector<float> lse;
  };
  std::array<std::int64_t, 4> o_shape() const {
    const Problem& p = c.plan.problem;
    return {p.batch, p.q_heads, p.q_len, p.value_dim};
  }

  /// Sum of outputs and LSEs times their gradients, in float64.
  double loss() const {
    const AttentionOutputs no_outputs{};
    const kernels::Call call{c.plan, c.inputs, no_outputs, 1, 0};
    const Problem& p = c.plan.problem;
    double total = 0;
    for (std::int64_t s = 0; s < p.batch; ++s) {
      for (std::int64_t h = 0; h < p.q_heads; ++h) {
        const auto sources = kernels::reference_sources(call, s, h / p.group());
        for (std::int64_t n = 0; n < p.q_len; ++n) {
          const auto row = kernels::attend_row(call, {s, h, c.plan.block_of(s, h), n}, sources);
          const auto index = static_cast<std::size_t>((s * p.q_heads + h) * p.q_len + n);
          for (std::size_t d = 0; d < row.output.size(); ++d)
            total += row.output[d] * d_o[index * row.output.size() + d];
          if (!std::isinf(row.lse)) total += row.lse * d_lse[index];
        }
      }
    }
    return total;
  }

  struct Result {
    std::vector<float> d_q;
    std::vector<float> d_k;
    std::vector<float> d_v;
    std::vector<float> d_factors;
    std::array<std::vector<float>*, 4> all() { return {&d_q, &d_k, &d_v, &d_factors}; }
  };
  Result gradients(KernelKind kind, std::optional<Isa> isa, int threads) const {
    const Problem& p = c.plan.problem;
    Forward forward{std::vector<float>(d_o.size()), std::vector<float>(d_lse.size())};
    RunOptions run_options;
    run_options.kernel = KernelKind::reference;
    run(c.plan, c.inputs, {mutable_view_of(forward.o.data(), DType::f32, o_shape()), forward.lse}, run_options);
    Result r;
    const auto place = [](std::vector<float>& memory, const std::array<std::int64_t, 4>& shape) {
      memory.assign(static_cast<std::size_t>(shape[0] * shape[1] * shape[2] * shape[3]), 99.0F);
      return mutable_view_of(memory.data(), DType::f32, shape);
    };
    Gradients g;
    g.d_q = place(r.d_q, {p.batch, p.q_heads, p.q_len, p.head_dim});
    g.d_k = place(r.d_k, {p.batch, p.kv_heads, p.kv_len, p.head_dim});
    g.d_v = place(r.d_v, {p.batch, p.kv_heads, p.kv_len, p.value_dim});
    if (c.inputs.modifiers.weights == RowWeights::reweighted) {
      r.d_factors.assign(d_lse.size(), 99.0F);
      g.d_weight_factors = r.d_factors;
    }
    SavedForward saved;
    saved.o = view_of(forward.o.data(), DType::f32, o_shape());
    const bool narrow = options.dtype == DType::bf16;
    saved.d_o = view_of(narrow ? static_cast<const void*>(d_o_narrow.data()) : d_o.data(),
                        narrow ? DType::bf16 : DType::f32, o_shape());
    saved.lse = forward.lse;
    saved.d_lse = d_lse;
    run_options.kernel = kind;
    run_options.isa = isa;
    run_options.threads = threads;
    run_backward(c.plan, c.inputs, saved, g, run_options);
    return r;
  }

  Random random;
  CaseOptions options;
  KernelCase c;
  std::vector<float> query_scale;
  std::vector<float> factors;
  std::vector<float> d_o;
  std::vector<float> d_lse;
  std::vector<std::uint16_t> d_o_narrow;
};

struct Rule {
  RowWeights weights;
  std::int32_t power;
};
constexpr std::array kRules{Rule{RowWeights::softmax, 1}, Rule{RowWeights::softplus, 1},
                            Rule{RowWeights::reweighted, 1}, Rule{RowWeights::reweighted, 3},
                            Rule{RowWeights::reweighted, 6}};

TEST(RowWeightsBackward, ReferenceMatchesCentralDifferences) {
  for (const Rule& rule : kRules) {
    WeightsCase w(7, rule.weights, rule.power, DType::f32, 16);
    const auto g = w.gradients(KernelKind::reference, std::nullopt, 1);
    const auto check = [&](OwnedTensor& tensor, const std::vector<float>& actual, const char* name) {
      std::mt19937 pick(3);
      const MutableTensorView& view = tensor.view;
      for (int sample = 0; sample < 25; ++sample) {
        const auto i = static_cast<std::int64_t>(pick() % actual.size());
        const std::int64_t d = i % view.shape[3];
        const std::int64_t n = i / view.shape[3] % view.shape[2];
        const std::int64_t h = i / view.shape[3] / view.shape[2] % view.shape[1];
        const std::int64_t b = i / view.shape[3] / view.shape[2] / view.shape[1];
        std::byte* row = view.row(b, h, n);
        const float kept = load_as_float(row, view.dtype, d);
        const float above = kept + 1e-2F;
        const float below = kept - 1e-2F;
        const auto at = [&](float x) {
          store_from_float(row, view.dtype, d, x);
          return w.loss();
        };
        // Two steps against the third order: inputs are floats, so that steps cannot be small.
        const double wide = (at(above) - at(below)) / (static_cast<double>(above) - below);
        const float near_above = kept + 5e-3F;
        const float near_below = kept - 5e-3F;
        const double near = (at(near_above) - at(near_below)) / (static_cast<double>(near_above) - near_below);
        at(kept);
        const double expected = (4 * near - wide) / 3;
        // Where the offset cuts a weight off, differences of power 1 are not smooth.
        const double tolerance = rule.weights == RowWeights::reweighted && rule.power == 1 ? 5e-2 : 2e-3;
        ASSERT_NEAR(actual[static_cast<std::size_t>(i)], expected, tolerance * (1 + std::fabs(expected)))
            << name_of(rule.weights) << " power " << rule.power << " " << name << " " << i;
      }
    };
    check(w.c.q, g.d_q, "d_q");
    check(w.c.k, g.d_k, "d_k");
    check(w.c.v, g.d_v, "d_v");
    for (std::size_t row = 0; row < g.d_factors.size(); row += 11) {
      const float kept = w.factors[row];
      w.factors[row] = kept + 1e-3F;
      const double above = w.loss();
      w.factors[row] = kept - 1e-3F;
      const double expected = (above - w.loss()) / 2e-3;
      w.factors[row] = kept;
      const double tolerance = rule.power == 1 ? 5e-2 : 2e-3;
      ASSERT_NEAR(g.d_factors[row], expected, tolerance * (1 + std::fabs(expected))) << "factor " << row;
    }
  }
}

TEST(RowWeightsBackward, EveryInstructionSetMatchesTheReference) {
  for (const Rule& rule : kRules) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      for (const std::int64_t tile_q : {1, 16, 64}) {
        const WeightsCase w(11, rule.weights, rule.power, dtype, tile_q);
        auto expected = w.gradients(KernelKind::reference, std::nullopt, 1);
        for (const Isa isa : supported_isas()) {
          for (const KernelKind kind : {KernelKind::query_major, KernelKind::key_major}) {
            auto actual = w.gradients(kind, isa, 2);
            for (std::size_t t = 0; t < 4; ++t) {
              const std::vector<float>& e = *expected.all()[t];
              const std::vector<float>& a = *actual.all()[t];
              ASSERT_EQ(e.size(), a.size());
              double largest = 0;
              for (const float x : e) largest = std::max(largest, std::fabs(static_cast<double>(x)));
              const bool pairs = isa == Isa::avx512_bf16 && dtype == DType::bf16;
              for (std::size_t i = 0; i < e.size(); ++i) {
                ASSERT_NEAR(a[i], e[i], (pairs ? 2e-2 : 2e-4) * largest)
                    << name_of(rule.weights) << " " << name_of(isa) << " " << name_of(kind) << " tensor " << t << " "
                    << i;
              }
            }
            if (isa == supported_isas().back()) {
              auto one = w.gradients(kind, isa, 1);
              for (std::size_t t = 0; t < 4; ++t) EXPECT_EQ(*one.all()[t], *actual.all()[t]);
            }
          }
        }
      }
    }
  }
}

TEST(RowWeightsBackward, FactorsOfOtherWeightsAreRefused) {
  const WeightsCase w(1, RowWeights::softplus, 1, DType::f32, 16);
  std::vector<float> o(w.d_o.size());
  SavedForward saved;
  saved.o = saved.d_o = view_of(o.data(), DType::f32, w.o_shape());
  saved.lse = w.d_lse;
  std::vector<float> factors(w.d_lse.size());
  Gradients gradients;
  gradients.d_weight_factors = factors;
  EXPECT_THROW(run_backward(w.c.plan, w.c.inputs, saved, gradients), Error);
}

}  // namespace
}  // namespace tessera::testing
