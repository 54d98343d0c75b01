// Kimi Delta Attention: the delta rule with one decay per token, head and key channel.
//
// Kimi Linear (arXiv:2510.26692): per head, with queries and keys of length 1,
//   S <- diag(exp(g_t)) S,   S <- S + beta_t k_t (v_t - S^T k_t)^T,   o_t = S^T q_t / sqrt(d)
// by chunks of 64 with sub-chunks of 16 (include/tessera/recurrent.h), decoding token by token. No positional encoding.
//
// Side inputs carry what the layer projects: `g`, as log decays or as the raw projection a of
//   gate=softplus  g = -exp(A_log) softplus(a + dt_bias)
//   gate=bounded   g = lower_bound sigmoid(exp(A_log) (a + dt_bias))
// (checkpoints of the two are not interchangeable), and `beta`, as it is or through a sigmoid. The layer's short
// convolutions, per-head norm and sigmoid output gate run here when their tensors are given; the projections, and the
// full attention layers between those of KDA, stay outside.
//
// Differs from the authors' code: the product around the middle row of a sub-chunk is taken wherever the decays in fact
// allow it, not only with the bounded gate, and decays are products of factors instead of differences of sums.
#include "methods/delta_layer.h"
#include "methods/registry.h"

namespace tessera {
namespace {

struct Kda {
  enum class Gate : std::uint8_t { log, softplus, bounded };
  struct Params : DeltaLayerParams {
    Gate gate = Gate::log;
    double lower_bound = -5;
    void visit(ParameterList& v) {
      v("gate", gate, {"log", "softplus", "bounded"},
        "how g is read: log decays, or raw values of -exp(A_log) softplus(g + dt_bias) or of lower_bound "
        "sigmoid(exp(A_log) (g + dt_bias))");
      v("lower_bound", lower_bound, -50, 0, "smallest log decay of gate=bounded");
      DeltaLayerParams::visit(v);
    }
  };
  static MethodInfo info() {
    return {.name = "kda",
            .family = "linear",
            .summary = "Kimi Delta Attention: delta rule with a decay per token, head and key channel",
            .paper = "Kimi Linear: An Expressive, Efficient Attention Architecture, arXiv:2510.26692",
            .phases = {.prefill = true, .decode = true, .backward = true},
            .side = delta_side_inputs("softplus, bounded", true, "sigmoid")};
  }

  explicit Kda(Params p) : params(p) { params.check("kda"); }

  std::unique_ptr<MethodState> new_state() const { return std::make_unique<RecurrentMethodState>(); }

  std::int64_t prefill_tile() const { return params.chunk; }

  RunReport attend(const Problem& problem, const AttentionInputs& inputs, const AttentionOutputs& outputs,
                   const PlanContext& context, Plan* /*executed*/) const {
    return layer(problem).attend(problem, inputs, outputs, context);
  }

  RunReport backward(const Problem& problem, const AttentionInputs& inputs, const SavedForward& saved,
                     const Gradients& gradients, const PlanContext& context, const Plan* /*executed*/) const {
    return layer(problem).backward(problem, inputs, saved, gradients, context);
  }

  DeltaLayer layer(const Problem& problem) const {
    const DecayGate gate = params.gate == Gate::log        ? DecayGate::log
                           : params.gate == Gate::softplus ? DecayGate::softplus
                                                           : DecayGate::bounded;
    return {"kda", params, GateCurve::sigmoid, gate, params.lower_bound, problem.head_dim};
  }

  Params params;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(kda, tessera::Kda);
