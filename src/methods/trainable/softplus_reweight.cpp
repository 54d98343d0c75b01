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
#include <algorithm>
#include <cmath>

#include "core/error.h"
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
            .phases = {.prefill = true, .decode = true}};
  }

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

  RunReport run_reweighted(const Plan& dense, const AttentionInputs& first_pass, const AttentionOutputs& outputs,
                           const Rows& rows, std::span<const float> log_sums, const PlanContext& context) const {
    std::vector<float> factors(log_sums.size());
    for (std::size_t i = 0; i < factors.size(); ++i) {
      factors[i] =
          std::isinf(log_sums[i]) ? 0.0F : rows.visible_of(static_cast<std::int64_t>(i)) * std::exp(-log_sums[i]);
    }
    AttentionInputs inputs = first_pass;
    inputs.modifiers.weights = RowWeights::reweighted;
    inputs.modifiers.weight_factors = factors;
    inputs.modifiers.weight_offset = static_cast<float>(params.offset);
    inputs.modifiers.weight_power = static_cast<std::int32_t>(params.power);
    std::vector<float> left(log_sums.size());
    RunReport report = run(dense, inputs, {outputs.o, left, outputs.scores}, context.run);
    keep_first_weights(dense, first_pass, outputs, log_sums, left, context, report);
    return report;
  }

  /// Rows that the offset left (next to) nothing of.
  void keep_first_weights(const Plan& dense, const AttentionInputs& first_pass, const AttentionOutputs& outputs,
                          std::span<const float> log_sums, std::span<const float> left, const PlanContext& context,
                          RunReport& report) const {
    const auto fell_short = [&](std::size_t row) {
      return !std::isinf(log_sums[row]) && !(std::exp(left[row]) >= params.epsilon) && !std::isnan(left[row]);
    };
    bool any = false;
    for (std::size_t row = 0; row < left.size(); ++row) any = any || fell_short(row);
    if (!any) return;
    const auto [batch, heads, tokens, dim] = outputs.o.shape;
    std::vector<std::byte> memory(left.size() * static_cast<std::size_t>(dim) * size_of(outputs.o.dtype));
    const MutableTensorView o = mutable_view_of(memory.data(), outputs.o.dtype, outputs.o.shape);
    report.kernel_ms += run(dense, first_pass, {o, {}}, context.run).kernel_ms;
    for (std::int64_t row = 0; row < batch * heads * tokens; ++row) {
      if (!fell_short(static_cast<std::size_t>(row))) continue;
      const std::int64_t b = row / (heads * tokens);
      const std::int64_t h = row / tokens % heads;
      std::copy_n(o.row(b, h, row % tokens), static_cast<std::size_t>(dim) * size_of(o.dtype),
                  outputs.o.row(b, h, row % tokens));
    }
  }

  Params params;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(softplus_reweight, tessera::SoftplusReweight);
