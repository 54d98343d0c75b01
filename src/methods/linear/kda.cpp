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
#include "core/error.h"
#include "methods/recurrent_attention.h"
#include "methods/registry.h"
#include "recurrent/operators.h"

namespace tessera {
namespace {

struct Kda {
  enum class Gate : std::uint8_t { log, softplus, bounded };
  struct Params {
    Gate gate = Gate::log;
    double lower_bound = -5;
    BetaGate beta_gate = BetaGate::none;
    bool l2norm = true;
    std::int64_t chunk = 64;
    OutputNorm norm = OutputNorm::none;
    double norm_eps = 1e-5;
    void visit(ParameterList& v) {
      v("gate", gate, {"log", "softplus", "bounded"},
        "how g is read: log decays, or raw values of -exp(A_log) softplus(g + dt_bias) or of lower_bound "
        "sigmoid(exp(A_log) (g + dt_bias))");
      v("lower_bound", lower_bound, -50, 0, "smallest log decay of gate=bounded");
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
    MethodInfo info{.name = "kda",
                    .family = "linear",
                    .summary = "Kimi Delta Attention: delta rule with a decay per token, head and key channel",
                    .paper = "Kimi Linear: An Expressive, Efficient Attention Architecture, arXiv:2510.26692",
                    .phases = {.prefill = true, .decode = true}};
    info.side = {{.name = "g",
                  .axes = {batch, q_heads, tokens, head_dim},
                  .minimum = -0.1,
                  .maximum = 0,
                  .description = "log decays, at most 0, or raw gates (gate=softplus, bounded)"},
                 {.name = "beta",
                  .axes = {batch, q_heads, tokens},
                  .minimum = 0,
                  .maximum = 1,
                  .description = "write strengths"},
                 {.name = "A_log",
                  .axes = {q_heads},
                  .required = false,
                  .description = "of gate=softplus and bounded; default 0"},
                 {.name = "dt_bias",
                  .axes = {q_heads, head_dim},
                  .required = false,
                  .description = "of gate=softplus and bounded; default 0"}};
    for (SideInputInfo& side : convolution_side_inputs()) info.side.push_back(std::move(side));
    for (SideInputInfo& side : output_side_inputs("sigmoid")) info.side.push_back(std::move(side));
    return info;
  }

  explicit Kda(Params p) : params(p) {
    require(params.chunk % 16 == 0, "kda: chunk={} is not a multiple of 16", params.chunk);
  }

  std::unique_ptr<MethodState> new_state() const { return std::make_unique<RecurrentMethodState>(); }

  RunReport attend(const Problem& problem, const AttentionInputs& inputs, const AttentionOutputs& outputs,
                   const PlanContext& context, Plan* /*executed*/) const {
    RecurrentLayer layer{.method = "kda", .convolutions = true, .options = {}};
    layer.normalise = params.l2norm;
    layer.norm = params.norm;
    layer.norm_epsilon = static_cast<float>(params.norm_eps);
    layer.options.chunk = params.chunk;
    return attend_recurrent(layer, problem, inputs, outputs, context, [&](SideReader& side, RecurrentGates& gates) {
      make_betas(side, params.beta_gate, gates);
      const auto bound = static_cast<float>(params.lower_bound);
      if (params.gate == Gate::log) {
        gates.decay = side.rows("g", problem.head_dim);
      } else if (params.gate == Gate::softplus) {
        make_decays(side, problem.q_heads, problem.head_dim, context.run.threads, recurrent::softplus_decay, gates);
      } else {
        make_decays(
            side, problem.q_heads, problem.head_dim, context.run.threads,
            [bound](float a, float bias, float a_log) { return recurrent::bounded_decay(a, bias, a_log, bound); },
            gates);
      }
    });
  }

  Params params;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(kda, tessera::Kda);
