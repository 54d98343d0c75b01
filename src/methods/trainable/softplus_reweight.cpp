// Softplus attention with re-weighting, LSSA and LSSAR (arXiv:2501.13428).
//
// A row with n visible keys has scores z = scale * log(head_dim) * log(n) * q.k and weights A = softplus(z) / sum. With
// re-weighting the weights become max(0, n * A - offset)^power, again divided by their sum: only keys above (offset
// times) the average count. That takes two passes, since a weight needs the sum of its row first; the first one
// multiplies only a few columns of the values.
//
// The paper's constants are not confirmed by its code, so they are parameters. A row whose weights hardly exceed the
// offset (sum below epsilon) keeps A: with all scores equal nothing would be left. The LSE returned is the logarithm of
// the sum of softplus(z); parts of a row merge by sums, not by maxima.
//
// Backward of the re-weighted form takes two passes as well. The second pass of the forward call gives gradients of q,
// k, v and of the factor n / sum of every row; the factor's reaches q and k through the logarithm of the first pass's
// sum. Rows that kept A take their gradient from the first pass alone.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "core/convert.h"
#include "core/error.h"
#include "core/parallel.h"
#include "methods/registry.h"

namespace tessera {
namespace {

struct SoftplusReweight {
  struct Params {
    bool reweight = true;
    double offset = 1;
    std::int64_t power = 3;
    bool length_scale = true;
    double epsilon = 1e-6;
    void visit(ParameterList& v) {
      v("reweight", reweight, "the second pass (LSSAR); without it LSSA");
      v("offset", offset, 0, 1e6, "multiple of the average weight that a key must exceed");
      v("power", power, 1, 64, "exponent of what exceeds it: 3 in training, larger when switched on later");
      v("length_scale", length_scale, "scores grow with log(head_dim) * log(visible keys)");
      v("epsilon", epsilon, 0, 1, "rows with a smaller sum after the offset keep the weights of the first pass");
    }
  };
  static MethodInfo info() {
    return {.name = "softplus-reweight",
            .family = "trainable",
            .summary = "softplus in place of exp, then only keys of more than average weight, sharpened by a power",
            .paper =
                "Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models, "
                "arXiv:2501.13428",
            .phases = {.prefill = true, .decode = true, .backward = true}};
  }

  std::int64_t prefill_tile() const { return 1; }

  Plan plan(const Problem& problem, const AttentionInputs&, const PlanContext&) const { return dense_plan(problem); }

  RunReport attend(const Problem& problem, const AttentionInputs& given, const AttentionOutputs& outputs,
                   const PlanContext& context, Plan* executed) const {
    require(given.modifiers.weights == RowWeights::softmax,
            "softplus-reweight: modifiers ask for {} weights; expected softmax, the method sets its own",
            name_of(given.modifiers.weights));
    const Rows rows(problem, params.length_scale, given.modifiers.query_scale);
    AttentionInputs inputs = given;
    inputs.modifiers.query_scale = rows.scale;
    inputs.modifiers.weights = RowWeights::softplus;
    Plan dense = dense_plan(problem);
    std::vector<float> log_sums(static_cast<std::size_t>(rows.count));
    RunReport report;
    if (params.reweight) {
      report.kernel_ms += sum_weights(problem, inputs, log_sums, context);
      add(report, run_reweighted(dense, inputs, outputs, rows, log_sums, context));
    } else {
      add(report, run(dense, inputs, {outputs.o, log_sums, outputs.scores}, context.run));
    }
    std::copy_n(log_sums.begin(), outputs.lse.size(), outputs.lse.begin());
    if (executed != nullptr) *executed = std::move(dense);
    return report;
  }

  RunReport backward(const Problem& problem, const AttentionInputs& given, const SavedForward& saved,
                     const Gradients& gradients, const PlanContext& context, const Plan* /*executed*/) const {
    require(given.modifiers.weights == RowWeights::softmax,
            "softplus-reweight: modifiers ask for {} weights; expected softmax, the method sets its own",
            name_of(given.modifiers.weights));
    require(gradients.d_weight_factors.empty(),
            "softplus-reweight: d_weight_factors is wanted; the method has its own");
    const Rows rows(problem, params.length_scale, given.modifiers.query_scale);
    require(static_cast<std::int64_t>(saved.lse.size()) == rows.count, "lse has {} elements; expected {}",
            saved.lse.size(), rows.count);
    require(saved.d_lse.empty() || static_cast<std::int64_t>(saved.d_lse.size()) == rows.count,
            "d_lse has {} elements; expected 0 or {}", saved.d_lse.size(), rows.count);
    AttentionInputs inputs = given;
    inputs.modifiers.query_scale = rows.scale;
    inputs.modifiers.weights = RowWeights::softplus;
    const Plan dense = dense_plan(problem);
    if (!params.reweight) return run_backward(dense, inputs, saved, gradients, context.run);
    return backward_reweighted(dense, inputs, saved, gradients, rows, context);
  }

  /// What depends on the number of keys that a query sees.
  struct Rows {
    std::int64_t count;
    std::vector<float> scale;    ///< per query token
    std::vector<float> visible;  ///< per query token

    Rows(const Problem& problem, bool length_scale, std::span<const float> given)
        : count((problem.variable_length() ? 1 : problem.batch) * problem.q_heads * problem.q_len) {
      scale.assign(static_cast<std::size_t>(problem.q_len), 1.0F);
      visible.assign(static_cast<std::size_t>(problem.q_len), 0.0F);
      std::copy(given.begin(), given.end(), scale.begin());
      const std::int64_t sequences = problem.variable_length() ? problem.batch : 1;
      for (std::int64_t s = 0; s < sequences; ++s) {
        for (std::int64_t n = 0; n < problem.q_len_of(s); ++n) {
          const std::int64_t keys = problem.kv_len_of(s);
          const std::int64_t seen =
              problem.causal ? std::clamp<std::int64_t>(problem.q_offset_of(s) + n + 1, 0, keys) : keys;
          const auto token = static_cast<std::size_t>(problem.q_begin_of(s) + n);
          visible[token] = static_cast<float>(seen);
          // One visible key has weight 1 whatever its score is.
          if (length_scale) {
            scale[token] *= static_cast<float>(std::log(static_cast<double>(problem.head_dim)) *
                                               std::log(static_cast<double>(std::max<std::int64_t>(seen, 2))));
          }
        }
      }
    }
    float visible_of(std::int64_t row) const { return visible[static_cast<std::size_t>(row) % visible.size()]; }
  };

  static void add(RunReport& report, const RunReport& part) {
    const double before = report.kernel_ms;
    report = part;
    report.kernel_ms += before;
  }

  /// The first pass: logarithms of the sums, over a few columns of the values. Returns its time.
  static double sum_weights(const Problem& problem, const AttentionInputs& given, std::span<float> log_sums,
                            const PlanContext& context) {
    Problem narrow = problem;
    narrow.value_dim = std::min<std::int64_t>(problem.value_dim, 16);
    AttentionInputs inputs = given;
    inputs.v.shape[3] = narrow.value_dim;
    std::vector<float> ignored(log_sums.size() * static_cast<std::size_t>(narrow.value_dim));
    const MutableTensorView o = mutable_view_of(ignored.data(), DType::f32,
                                                {given.q.batch(), problem.q_heads, problem.q_len, narrow.value_dim});
    return run(dense_plan(narrow), inputs, {o, log_sums}, context.run).kernel_ms;
  }

  static std::vector<float> factors_of(const Rows& rows, std::span<const float> log_sums) {
    // Rows of almost no weight: a smaller factor than theirs leaves them nothing, and they keep their first weights.
    constexpr float most = 1e30F;
    std::vector<float> factors(log_sums.size());
    for (std::size_t i = 0; i < factors.size(); ++i) {
      const float factor = rows.visible_of(static_cast<std::int64_t>(i)) * std::exp(-log_sums[i]);
      factors[i] = std::isinf(log_sums[i]) ? 0.0F : std::min(factor, most);
    }
    return factors;
  }

  AttentionInputs second_pass(const AttentionInputs& first_pass, std::span<const float> factors) const {
    AttentionInputs inputs = first_pass;
    inputs.modifiers.weights = RowWeights::reweighted;
    inputs.modifiers.weight_factors = factors;
    inputs.modifiers.weight_offset = static_cast<float>(params.offset);
    inputs.modifiers.weight_power = static_cast<std::int32_t>(params.power);
    return inputs;
  }

  /// Whether the offset left (next to) nothing of a row.
  bool fell_short(float log_sum, float left) const {
    return !std::isinf(log_sum) && !(std::exp(left) >= params.epsilon) && !std::isnan(left);
  }

  RunReport run_reweighted(const Plan& dense, const AttentionInputs& first_pass, const AttentionOutputs& outputs,
                           const Rows& rows, std::span<const float> log_sums, const PlanContext& context) const {
    const std::vector<float> factors = factors_of(rows, log_sums);
    const AttentionInputs inputs = second_pass(first_pass, factors);
    std::vector<float> left(log_sums.size());
    RunReport report = run(dense, inputs, {outputs.o, left, outputs.scores}, context.run);
    keep_first_weights(dense, first_pass, outputs, log_sums, left, context, report);
    return report;
  }

  /// Rows that the offset left (next to) nothing of.
  void keep_first_weights(const Plan& dense, const AttentionInputs& first_pass, const AttentionOutputs& outputs,
                          std::span<const float> log_sums, std::span<const float> left, const PlanContext& context,
                          RunReport& report) const {
    bool any = false;
    for (std::size_t row = 0; row < left.size(); ++row) any = any || fell_short(log_sums[row], left[row]);
    if (!any) return;
    const auto [batch, heads, tokens, dim] = outputs.o.shape;
    std::vector<std::byte> memory(left.size() * static_cast<std::size_t>(dim) * size_of(outputs.o.dtype));
    const MutableTensorView o = mutable_view_of(memory.data(), outputs.o.dtype, outputs.o.shape);
    report.kernel_ms += run(dense, first_pass, {o, {}}, context.run).kernel_ms;
    for (std::int64_t row = 0; row < batch * heads * tokens; ++row) {
      if (!fell_short(log_sums[row], left[row])) continue;
      const std::int64_t b = row / (heads * tokens);
      const std::int64_t h = row / tokens % heads;
      std::copy_n(o.row(b, h, row % tokens), static_cast<std::size_t>(dim) * size_of(o.dtype),
                  outputs.o.row(b, h, row % tokens));
    }
  }

  /// Gradients of one of the two passes, in floats.
  struct PassGradients {
    std::vector<float> d_q;
    std::vector<float> d_k;
    std::vector<float> d_v;
    std::vector<float> d_key_bias;
    Gradients views;

    PassGradients(const Gradients& wanted, bool values) {
      views.d_q = alike(wanted.d_q, d_q);
      views.d_k = alike(wanted.d_k, d_k);
      if (values) views.d_v = alike(wanted.d_v, d_v);
      views.d_key_bias = alike(wanted.d_key_bias, d_key_bias);
    }

   private:
    static MutableTensorView alike(const MutableTensorView& wanted, std::vector<float>& memory) {
      if (wanted.data == nullptr) return {};
      memory.resize(static_cast<std::size_t>(wanted.shape[0] * wanted.shape[1] * wanted.shape[2] * wanted.shape[3]));
      return mutable_view_of(memory.data(), DType::f32, wanted.shape);
    }
  };

  /// to = a + b; b without numbers counts as 0.
  static void add_up(const MutableTensorView& to, const std::vector<float>& a, const std::vector<float>& b,
                     int threads) {
    if (to.data == nullptr) return;
    const auto [batch, heads, tokens, dim] = to.shape;
    parallel_for(batch * heads, threads, [&, heads = heads, tokens = tokens, dim = dim](std::int64_t i, int) {
      std::vector<float> row(static_cast<std::size_t>(dim));
      for (std::int64_t n = 0; n < tokens; ++n) {
        const std::int64_t at = (i * tokens + n) * dim;
        for (std::int64_t d = 0; d < dim; ++d) row[d] = a[at + d] + (b.empty() ? 0.0F : b[at + d]);
        from_float(row.data(), dim, to.dtype, to.row(i / heads, i % heads, n));
      }
    });
  }

  RunReport backward_reweighted(const Plan& dense, const AttentionInputs& first_pass, const SavedForward& saved,
                                const Gradients& gradients, const Rows& rows, const PlanContext& context) const {
    const std::vector<float> factors = factors_of(rows, saved.lse);
    const AttentionInputs inputs = second_pass(first_pass, factors);
    std::vector<float> left(saved.lse.size());
    double kernel_ms = sum_weights(dense.problem, inputs, left, context);
    std::vector<std::uint8_t> kept_first(left.size(), 0);
    for (std::size_t row = 0; row < left.size(); ++row) {
      if (!fell_short(saved.lse[row], left[row])) continue;
      kept_first[row] = 1;
      left[row] = -std::numeric_limits<float>::infinity();  // no weight in this pass
    }
    const bool any_kept = std::find(kept_first.begin(), kept_first.end(), 1) != kept_first.end();

    PassGradients second(gradients, true);
    std::vector<float> d_factors(left.size());
    second.views.d_weight_factors = d_factors;
    SavedForward of_second = saved;
    of_second.lse = left;
    of_second.d_lse = {};
    RunReport report = run_backward(dense, inputs, of_second, second.views, context.run);
    kernel_ms += report.kernel_ms;

    // factor = n exp(-log_sum).
    std::vector<float> d_log_sums(left.size());
    for (std::size_t row = 0; row < left.size(); ++row) {
      d_log_sums[row] = (saved.d_lse.empty() ? 0.0F : saved.d_lse[row]) - factors[row] * d_factors[row];
    }
    PassGradients first(gradients, any_kept);
    kernel_ms += backward_first(dense, first_pass, saved, kept_first, any_kept, d_log_sums, first.views, context);
    add_up(gradients.d_q, second.d_q, first.d_q, context.run.threads);
    add_up(gradients.d_k, second.d_k, first.d_k, context.run.threads);
    add_up(gradients.d_v, second.d_v, first.d_v, context.run.threads);
    add_up(gradients.d_key_bias, second.d_key_bias, first.d_key_bias, context.run.threads);
    report.kernel_ms = kernel_ms;
    return report;
  }

  /// Gradients by the logarithms of the first pass's sums, and by the outputs of the rows that kept its weights.
  /// Without such rows a few columns of the values are enough. Returns its time.
  static double backward_first(const Plan& dense, const AttentionInputs& first_pass, const SavedForward& saved,
                               std::span<const std::uint8_t> kept_first, bool any_kept,
                               std::span<const float> d_log_sums, const Gradients& gradients,
                               const PlanContext& context) {
    Problem problem = dense.problem;
    AttentionInputs inputs = first_pass;
    if (!any_kept) problem.value_dim = inputs.v.shape[3] = std::min<std::int64_t>(problem.value_dim, 16);
    std::array<std::int64_t, 4> shape = saved.d_o.shape;
    shape[3] = problem.value_dim;
    std::vector<std::byte> memory(kept_first.size() * static_cast<std::size_t>(shape[3]) * size_of(saved.d_o.dtype));
    const MutableTensorView d_o = mutable_view_of(memory.data(), saved.d_o.dtype, shape);
    for (std::int64_t row = 0; any_kept && row < static_cast<std::int64_t>(kept_first.size()); ++row) {
      if (kept_first[row] == 0) continue;
      const std::int64_t b = row / (shape[1] * shape[2]);
      const std::int64_t h = row / shape[2] % shape[1];
      std::copy_n(saved.d_o.row(b, h, row % shape[2]), static_cast<std::size_t>(shape[3]) * size_of(d_o.dtype),
                  d_o.row(b, h, row % shape[2]));
    }
    SavedForward of_first = saved;
    of_first.o.shape[3] = shape[3];
    of_first.d_o = d_o;
    of_first.d_lse = d_log_sums;
    return run_backward(any_kept ? dense : dense_plan(problem), inputs, of_first, gradients, context.run).kernel_ms;
  }

  Params params;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(softplus_reweight, tessera::SoftplusReweight);
