// Lightning Attention-2: causal linear attention with one constant decay per head, by blocks.
//
// Lightning Attention-2 (arXiv:2401.04658), the kernel of TransNormerLLM (arXiv:2405.17381): per head, with decay
// lambda,
//   KV_t = lambda KV_(t-1) + k_t v_t^T,     o_t = KV_t^T q_t
// and per block of `block` tokens O = (Q K^T . D) V + diag(lambda^(i+1)) Q KV, D[i,j] = lambda^(i-j) for j <= i, KV <-
// lambda^B KV + (diag(lambda^(B-1-i)) K)^T V with the true length B of the block. No softmax and no denominator; the
// default scale is 1.
//
// Decays: `alibi` lambda = exp(-m_h (1 - l / (L - 1) + 1e-5)) with ALiBi's slopes m_h and layer l of L (one layer
// counts as the first of many); `alibi-constant` without the layer's factor (MiniCPM-SALA, arXiv:2602.11761); `linear`
// exp(-(8 h / H) (1 - l / L)); `retnet` 1 - 2^(-5-h) (arXiv:2307.08621); `none`; `given` by the side input `lambda`.
//
// Differs from the authors' code: the stored KV equals that of the recurrence (theirs is one decay ahead, which a
// shifted factor on K makes up for), and any head dimension runs in one piece instead of slices whose outputs add. The
// layer's projections stay outside; SiLU on q and k, the norm and the output gate can run here.
#include <cmath>

#include "core/error.h"
#include "methods/recurrent_attention.h"
#include "methods/registry.h"
#include "recurrent/operators.h"

namespace tessera {
namespace {

struct Lightning2 {
  enum class Decay : std::uint8_t { alibi, alibi_constant, linear, retnet, none, given };
  enum class Activation : std::uint8_t { none, silu };
  struct Params {
    Decay decay = Decay::alibi;
    std::int64_t block = 64;
    RecurrentSchedule schedule = RecurrentSchedule::loop;
    Activation activation = Activation::none;
    OutputNorm norm = OutputNorm::none;
    double norm_eps = 1e-5;
    void visit(ParameterList& v) {
      v("decay", decay, {"alibi", "alibi-constant", "linear", "retnet", "none", "given"},
        "decay per head: ALiBi slopes weaker in later layers, without the layer, linear in the head, RetNet's, none, "
        "or "
        "the side input lambda");
      v("block", block, 16, 128, "tokens per block, a multiple of 16");
      v("schedule", schedule, {"loop", "parallel"},
        "blocks in order, or local states, prefix sums and all outputs at once");
      v("activation", activation, {"none", "silu"}, "applied to queries and keys");
      v("norm", norm, {"none", "head", "full"}, "RMS norm of the outputs, per head or over all heads");
      v("norm_eps", norm_eps, 0, 1, "added to the mean of squares of the norm");
    }
  };
  static MethodInfo info() {
    using enum SideAxis;
    MethodInfo info{.name = "lightning2",
                    .family = "linear",
                    .summary = "linear attention with a constant decay per head, by blocks (also RetNet, SALA)",
                    .paper = "Lightning Attention-2, arXiv:2401.04658",
                    .phases = {.prefill = true, .decode = true, .backward = true}};
    info.side = {{.name = "lambda",
                  .axes = {q_heads},
                  .minimum = 0.9,
                  .maximum = 1,
                  .required = false,
                  .description = "decay per head in (0, 1]; needed with decay=given"}};
    for (SideInputInfo& side : output_side_inputs("sigmoid")) info.side.push_back(std::move(side));
    info.side.push_back(initial_state_side_input());
    return info;
  }

  explicit Lightning2(Params p) : params(p) {
    require(params.block % 16 == 0, "lightning2: block={} is not a multiple of 16", params.block);
  }

  std::unique_ptr<MethodState> new_state() const { return std::make_unique<RecurrentMethodState>(); }

  /// The state carries what came before; parts of whole blocks give the same sums in the same order.
  std::int64_t prefill_tile() const { return params.block; }

  /// Log decay per query head.
  std::vector<float> log_decays(std::int64_t heads, const PlanContext& context, const SideReader& side) const {
    const auto layer = static_cast<double>(context.layer);
    const auto layers = static_cast<double>(context.layers);
    std::vector<float> decays(static_cast<std::size_t>(heads), 0.0F);
    const std::vector<float> slopes = recurrent::alibi_slopes(heads);
    const std::vector<float> given =
        params.decay == Decay::given ? side.vector("lambda", heads) : std::vector<float>(decays.size(), 1.0F);
    const double later = context.layers > 1 ? 1 - layer / (layers - 1) + 1e-5 : 1 + 1e-5;
    for (std::int64_t h = 0; h < heads; ++h) {
      const auto i = static_cast<std::size_t>(h);
      double g = 0;
      switch (params.decay) {
        case Decay::alibi:
          g = -slopes[i] * later;
          break;
        case Decay::alibi_constant:
          g = -slopes[i];
          break;
        case Decay::linear:
          g = -8.0 * static_cast<double>(h) / static_cast<double>(heads) * (1 - layer / layers);
          break;
        case Decay::retnet:
          g = std::log1p(-std::exp2(-5.0 - static_cast<double>(h)));
          break;
        case Decay::none:
          break;
        case Decay::given:
          require(given[i] > 0 && given[i] <= 1, "lightning2: lambda of head {} is {}; expected a number in (0, 1]", h,
                  given[i]);
          g = std::log(static_cast<double>(given[i]));
          break;
      }
      decays[i] = static_cast<float>(g);
    }
    return decays;
  }

  RunReport attend(const Problem& problem, const AttentionInputs& inputs, const AttentionOutputs& outputs,
                   const PlanContext& context, Plan* /*executed*/) const {
    return attend_recurrent(layer(), problem, inputs, outputs, context, rule(problem, context));
  }

  RunReport backward(const Problem& problem, const AttentionInputs& inputs, const SavedForward& saved,
                     const Gradients& gradients, const PlanContext& context, const Plan* /*executed*/) const {
    return backward_recurrent(layer(), problem, inputs, saved, gradients, context, rule(problem, context));
  }

  RecurrentLayer layer() const {
    RecurrentLayer layer{.method = "lightning2", .default_scale = 1, .options = {}};
    layer.silu = params.activation == Activation::silu;
    layer.norm = params.norm;
    layer.norm_epsilon = static_cast<float>(params.norm_eps);
    layer.options.chunk = params.block;
    layer.options.schedule = params.schedule;
    return layer;
  }

  GateRule rule(const Problem& problem, const PlanContext& context) const {
    GateRule rule;
    const std::int64_t heads = problem.q_heads;
    rule.make = [this, heads, &context](SideReader& side, RecurrentGates& gates) {
      if (params.decay == Decay::none) return;
      gates.decay_values = log_decays(heads, context, side);
      gates.decay = view_of(gates.decay_values.data(), DType::f32, {side.batch(), heads, side.tokens(), 1});
      gates.decay.strides = {0, 1, 0, 1};
    };
    if (params.decay != Decay::given) return rule;
    rule.decay_sides = {"lambda"};
    rule.backward = [heads](SideReader& side, const GateGradients& d, const Gradients& gradients) {
      if (d.decay.data == nullptr) return;
      const std::vector<float> lambda = side.vector("lambda", heads);
      std::vector<double> d_lambda(lambda.size(), 0.0);
      for (std::int64_t h = 0; h < heads; ++h) {
        const auto i = static_cast<std::size_t>(h);
        for (std::int64_t b = 0; b < d.decay.batch(); ++b) {
          for (std::int64_t n = 0; n < d.decay.tokens(); ++n) {
            d_lambda[i] += load_as_float(d.decay.row(b, h, n), DType::f32, 0);
          }
        }
        d_lambda[i] /= lambda[i];  // the decay is its logarithm
      }
      write_side_gradient(gradients, "lambda", d_lambda);
    };
    return rule;
  }

  Params params;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(lightning2, tessera::Lightning2);
