#include "methods/delta_layer.h"

#include <string>
#include <utility>

#include "core/error.h"

namespace tessera {

void DeltaLayerParams::visit(ParameterList& v) {
  v("beta_gate", beta_gate, {"none", "sigmoid", "twice-sigmoid"}, "applied to beta");
  v("l2norm", l2norm, "queries and keys are divided by sqrt(squared length + 1e-6); the rule needs keys of length 1");
  v("chunk", chunk, 16, 128, "tokens per chunk, a multiple of 16");
  v("norm", norm, {"none", "head", "full"}, "RMS norm of the outputs, per head (as in the layer) or over all heads");
  v("norm_eps", norm_eps, 0, 1, "added to the mean of squares of the norm");
}

void DeltaLayerParams::check(std::string_view method) const {
  require(chunk % 16 == 0, "{}: chunk={} is not a multiple of 16", method, chunk);
}

DeltaLayer::DeltaLayer(std::string_view method, const DeltaLayerParams& params, GateCurve output_gate, DecayGate gate,
                       double lower_bound, std::int64_t width)
    : layer_{.method = method, .convolutions = true, .options = {}},
      beta_gate_(params.beta_gate),
      gate_(gate),
      lower_bound_(lower_bound),
      width_(width) {
  layer_.normalise = params.l2norm;
  layer_.norm = params.norm;
  layer_.norm_epsilon = static_cast<float>(params.norm_eps);
  layer_.output_gate = output_gate;
  layer_.options.chunk = params.chunk;
}

GateRule DeltaLayer::rule(const Problem& problem, const PlanContext& context) const {
  GateRule rule;
  const std::int64_t heads = problem.q_heads;
  const int threads = context.run.threads;
  if (gate_ != DecayGate::none) rule.decay_sides = {"g", "A_log", "dt_bias"};
  rule.make = [this, heads, threads](SideReader& side, RecurrentGates& gates) {
    make_betas(side, beta_gate_, gates);
    if (gate_ == DecayGate::log) {
      gates.decay = side.rows("g", width_);
    } else if (gate_ != DecayGate::none) {
      make_decays(side, heads, width_, threads,
                  gate_ == DecayGate::softplus ? softplus_curve() : bounded_curve(lower_bound_), gates);
    }
  };
  rule.backward = [this, heads, threads](SideReader& side, const GateGradients& d, const Gradients& gradients) {
    if (d.beta.data != nullptr) backward_betas(side, beta_gate_, d.beta, gradients);
    if (d.decay.data == nullptr) return;
    if (gate_ == DecayGate::log) {
      copy_rows(d.decay, side.gradient_rows(gradients, "g", width_));
    } else {
      backward_decays(side, heads, width_, threads,
                      gate_ == DecayGate::softplus ? softplus_curve() : bounded_curve(lower_bound_), d.decay,
                      gradients);
    }
  };
  return rule;
}

RunReport DeltaLayer::attend(const Problem& problem, const AttentionInputs& inputs, const AttentionOutputs& outputs,
                             const PlanContext& context) const {
  return attend_recurrent(layer_, problem, inputs, outputs, context, rule(problem, context));
}

RunReport DeltaLayer::backward(const Problem& problem, const AttentionInputs& inputs, const SavedForward& saved,
                               const Gradients& gradients, const PlanContext& context) const {
  return backward_recurrent(layer_, problem, inputs, saved, gradients, context, rule(problem, context));
}

std::vector<SideInputInfo> delta_side_inputs(std::string_view gates, bool channels, std::string_view output_curve) {
  using enum SideAxis;
  const std::string of = "of gate=" + std::string(gates) + "; default 0";
  std::vector<SideInputInfo> side = {
      {.name = "g",
       .axes = {batch, q_heads, tokens},
       .minimum = -0.1,
       .maximum = 0,
       .description = "log decays, at most 0, or raw gates (gate=" + std::string(gates) + ")"},
      {.name = "beta", .axes = {batch, q_heads, tokens}, .minimum = 0, .maximum = 1, .description = "write strengths"},
      {.name = "A_log", .axes = {q_heads}, .required = false, .description = of},
      {.name = "dt_bias", .axes = {q_heads}, .required = false, .description = of}};
  if (channels) {
    side[0].axes.push_back(head_dim);
    side[3].axes.push_back(head_dim);
  }
  for (SideInputInfo& more : convolution_side_inputs()) side.push_back(std::move(more));
  for (SideInputInfo& more : output_side_inputs(output_curve)) side.push_back(std::move(more));
  side.push_back(initial_state_side_input());
  return side;
}

}  // namespace tessera
