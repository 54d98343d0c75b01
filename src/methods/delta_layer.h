// What the methods by the delta rule share: parameters, side inputs, gates.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "methods/parameters.h"
#include "methods/recurrent_attention.h"

namespace tessera {

/// How the side input `g` becomes log decays.
enum class DecayGate : std::uint8_t { log, softplus, bounded, none };

/// Parameters of every layer by the delta rule.
struct DeltaLayerParams {
  BetaGate beta_gate = BetaGate::none;
  bool l2norm = true;
  std::int64_t chunk = 64;
  OutputNorm norm = OutputNorm::none;
  double norm_eps = 1e-5;

  void visit(ParameterList& v);
  /// Throws Error that names the method.
  void check(std::string_view method) const;
};

/// A layer by the delta rule on one call.
class DeltaLayer {
 public:
  /// Decays have `width` numbers per token and head: 1, or one per key channel.
  DeltaLayer(std::string_view method, const DeltaLayerParams& params, GateCurve output_gate, DecayGate gate,
             double lower_bound, std::int64_t width);

  RunReport attend(const Problem& problem, const AttentionInputs& inputs, const AttentionOutputs& outputs,
                   const PlanContext& context) const;
  RunReport backward(const Problem& problem, const AttentionInputs& inputs, const SavedForward& saved,
                     const Gradients& gradients, const PlanContext& context) const;

  /// Tokens of the chunks that are computed together.
  std::int64_t chunk() const { return layer_.options.chunk; }

 private:
  GateRule rule(const Problem& problem, const PlanContext& context) const;

  RecurrentLayer layer_;
  BetaGate beta_gate_;
  DecayGate gate_;
  double lower_bound_;
  std::int64_t width_;
};

/// Side inputs of such a method. `gates` lists the values of its parameter gate that read raw numbers; `channels`: a
/// decay per key channel.
std::vector<SideInputInfo> delta_side_inputs(std::string_view gates, bool channels, std::string_view output_curve);

}  // namespace tessera
