// Gated DeltaNet: the delta rule with one decay per token and head.
//
// Gated DeltaNet (arXiv:2412.06464), with g = 0 DeltaNet (arXiv:2406.06484): per head, with queries and keys of length
// 1,
//   S <- exp(g_t) S,   S <- S + beta_t k_t (v_t - S^T k_t)^T,   o_t = S^T q_t / sqrt(d)
// by chunks with the UT transform (include/tessera/recurrent.h), decoding token by token.
//
// Side inputs carry what the layer projects: `g`, as the log decay itself or (gate=softplus) as the raw projection a of
// g = -exp(A_log) softplus(a + dt_bias), and `beta`, as it is or through a sigmoid (times 2 for states that may flip
// sign). The layer's short convolutions, norm and SiLU output gate run here when their tensors are given, the
// projections stay outside. Convolutions are the causal ones of width w over the tokens as they arrive; the rows that
// the next call needs are in the state.
//
// Differs from the authors' layer: there values may have more heads than queries and keys; here, as everywhere in
// AttentionInputs, keys and values have the same heads and serve groups of query heads (run_recurrent does both).
#include "core/error.h"
#include "methods/recurrent_attention.h"
#include "methods/registry.h"
#include "recurrent/operators.h"

namespace tessera {
namespace {

struct GatedDeltaNet {
  enum class Gate : std::uint8_t { log, softplus, none };
  struct Params {
    Gate gate = Gate::log;
    BetaGate beta_gate = BetaGate::none;
    bool l2norm = true;
    std::int64_t chunk = 64;
    OutputNorm norm = OutputNorm::none;
    double norm_eps = 1e-5;
    void visit(ParameterList& v) {
      v("gate", gate, {"log", "softplus", "none"},
        "how g is read: log decays, raw values of -exp(A_log) softplus(g + dt_bias), or not at all (DeltaNet)");
      v("beta_gate", beta_gate, {"none", "sigmoid", "twice-sigmoid"}, "applied to beta");
      v("l2norm", l2norm,
        "queries and keys are divided by sqrt(squared length + 1e-6); the rule needs keys of length 1");
      v("chunk", chunk, 16, 128, "tokens per chunk, a multiple of 16");
      v("norm", norm, {"none", "head", "full"},
        "RMS norm of the outputs, per head (as in the layer) or over all heads");
      v("norm_eps", norm_eps, 0, 1, "added to the mean of squares of the norm");
    }
  };
  static MethodInfo info() {
    using enum SideAxis;
    MethodInfo info{.name = "gated-deltanet",
                    .family = "linear",
                    .summary = "delta rule with a decay per token and head; DeltaNet with gate=none",
                    .paper = "Gated Delta Networks: Improving Mamba2 with Delta Rule, arXiv:2412.06464",
                    .phases = {.prefill = true, .decode = true}};
    info.side = {
        {.name = "g",
         .axes = {batch, q_heads, tokens},
         .minimum = -0.1,
         .maximum = 0,
         .description = "log decays, at most 0, or raw gates (gate=softplus); not read with gate=none"},
        {.name = "beta",
         .axes = {batch, q_heads, tokens},
         .minimum = 0,
         .maximum = 1,
         .description = "write strengths"},
        {.name = "A_log", .axes = {q_heads}, .required = false, .description = "of gate=softplus; default 0"},
        {.name = "dt_bias", .axes = {q_heads}, .required = false, .description = "of gate=softplus; default 0"}};
    for (SideInputInfo& side : convolution_side_inputs()) info.side.push_back(std::move(side));
    for (SideInputInfo& side : output_side_inputs("silu")) info.side.push_back(std::move(side));
    return info;
  }

  explicit GatedDeltaNet(Params p) : params(p) {
    require(params.chunk % 16 == 0, "gated-deltanet: chunk={} is not a multiple of 16", params.chunk);
  }

  std::unique_ptr<MethodState> new_state() const { return std::make_unique<RecurrentMethodState>(); }

  RunReport attend(const Problem& problem, const AttentionInputs& inputs, const AttentionOutputs& outputs,
                   const PlanContext& context, Plan* /*executed*/) const {
    RecurrentLayer layer{.method = "gated-deltanet", .convolutions = true, .options = {}};
    layer.normalise = params.l2norm;
    layer.norm = params.norm;
    layer.norm_epsilon = static_cast<float>(params.norm_eps);
    layer.output_gate = GateCurve::silu;
    layer.options.chunk = params.chunk;
    return attend_recurrent(layer, problem, inputs, outputs, context, [&](SideReader& side, RecurrentGates& gates) {
      make_betas(side, params.beta_gate, gates);
      if (params.gate == Gate::softplus) {
        make_decays(side, problem.q_heads, 1, context.run.threads, recurrent::softplus_decay, gates);
      } else if (params.gate == Gate::log) {
        gates.decay = side.rows("g", 1);
      }
    });
  }

  Params params;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(gated_deltanet, tessera::GatedDeltaNet);
