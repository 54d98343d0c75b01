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
#include "methods/delta_layer.h"
#include "methods/registry.h"

namespace tessera {
namespace {

struct GatedDeltaNet {
  enum class Gate : std::uint8_t { log, softplus, none };
  struct Params : DeltaLayerParams {
    Gate gate = Gate::log;
    void visit(ParameterList& v) {
      v("gate", gate, {"log", "softplus", "none"},
        "how g is read: log decays, raw values of -exp(A_log) softplus(g + dt_bias), or not at all (DeltaNet)");
      DeltaLayerParams::visit(v);
    }
  };
  static MethodInfo info() {
    return {.name = "gated-deltanet",
            .family = "linear",
            .summary = "delta rule with a decay per token and head; DeltaNet with gate=none",
            .paper = "Gated Delta Networks: Improving Mamba2 with Delta Rule, arXiv:2412.06464",
            .phases = {.prefill = true, .decode = true, .backward = true},
            .side = delta_side_inputs("softplus", false, "silu")};
  }

  explicit GatedDeltaNet(const Params& p)
      : layer("gated-deltanet", p, GateCurve::silu,
              p.gate == Gate::log        ? DecayGate::log
              : p.gate == Gate::softplus ? DecayGate::softplus
                                         : DecayGate::none,
              0, 1) {
    p.check("gated-deltanet");
  }

  std::unique_ptr<MethodState> new_state() const { return std::make_unique<RecurrentMethodState>(); }

  std::int64_t prefill_tile() const { return layer.chunk(); }

  RunReport attend(const Problem& problem, const AttentionInputs& inputs, const AttentionOutputs& outputs,
                   const PlanContext& context, Plan* /*executed*/) const {
    return layer.attend(problem, inputs, outputs, context);
  }

  RunReport backward(const Problem& problem, const AttentionInputs& inputs, const SavedForward& saved,
                     const Gradients& gradients, const PlanContext& context, const Plan* /*executed*/) const {
    return layer.backward(problem, inputs, saved, gradients, context);
  }

  DeltaLayer layer;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(gated_deltanet, tessera::GatedDeltaNet);
