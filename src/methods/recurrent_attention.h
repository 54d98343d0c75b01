// What the recurrent methods share: which tokens a call adds, side inputs, states across calls, the layer's other
// steps.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "methods/side_reader.h"
#include "tessera/method.h"
#include "tessera/recurrent.h"

namespace tessera {

/// Norm of the outputs before the output gate.
enum class OutputNorm : std::uint8_t { none, head, full };
/// Squashing of the output gate.
enum class GateCurve : std::uint8_t { sigmoid, silu };
/// How betas are made of the side input.
enum class BetaGate : std::uint8_t { none, sigmoid, twice_sigmoid };

/// Per layer: states and the rows before the next token that convolutions need.
class RecurrentMethodState final : public MethodState {
 public:
  struct Layer {
    RecurrentState states;
    std::map<std::string, std::vector<float>, std::less<>>
        tails;  ///< by side input: [sequences, heads, width - 1, dim]
  };
  std::map<std::int64_t, Layer> layers;
};

/// The steps around the recurrence that a method asks for.
struct RecurrentLayer {
  std::string_view method;
  float default_scale = 0;  ///< 0: 1 / sqrt(head_dim)
  bool normalise = false;   ///< queries and keys to length 1
  bool silu = false;        ///< on queries and keys, without convolutions
  bool convolutions = false;
  OutputNorm norm = OutputNorm::none;
  float norm_epsilon = 1e-5F;
  GateCurve output_gate = GateCurve::sigmoid;
  RecurrentOptions options;
};

/// Decays and betas of a call; the vectors own what the views look at, where they were computed.
struct RecurrentGates {
  TensorView decay = {};
  TensorView beta = {};
  std::vector<float> decay_values = {};
  std::vector<float> beta_values = {};
};
/// Their gradients, float32; null where they are not wanted.
struct GateGradients {
  TensorView decay = {};
  TensorView beta = {};
};

/// How a method makes its gates of side inputs, and passes their gradients on to those.
struct GateRule {
  std::function<void(SideReader&, RecurrentGates&)> make;
  std::vector<std::string_view> decay_sides = {};  ///< side inputs that the decays depend on
  std::function<void(SideReader&, const GateGradients&, const Gradients&)> backward = {};
};

/// beta = curve(side input `beta`), or that itself.
void make_betas(SideReader& side, BetaGate gate, RecurrentGates& gates);
void backward_betas(SideReader& side, BetaGate gate, const TensorView& d_beta, const Gradients& gradients);

/// Log decay of a raw gate: g(a, bias, a_log), and its derivatives by a (and so by the bias) and by a_log.
struct DecayCurve {
  std::function<float(float, float, float)> value;
  struct Slopes {
    double by_raw;
    double by_a_log;
  };
  std::function<Slopes(double, double, double)> slopes;
};
DecayCurve softplus_curve();
/// Between lower_bound, which is negative, and 0.
DecayCurve bounded_curve(double lower_bound);
/// Decays of the side inputs `g` [B, heads, N, width], `dt_bias` [q_heads, width] and `A_log` [q_heads], the last two 0
/// where absent.
void make_decays(SideReader& side, std::int64_t q_heads, std::int64_t width, int threads, const DecayCurve& curve,
                 RecurrentGates& gates);
void backward_decays(SideReader& side, std::int64_t q_heads, std::int64_t width, int threads, const DecayCurve& curve,
                     const TensorView& d_decay, const Gradients& gradients);

/// One call of a recurrent method.
///
/// Which tokens it adds: with as many queries as keys all of them, continuing from the state; with more keys either
/// those that the state has not seen, which must be as many as the queries, or, with a fresh state, all keys, of which
/// the last have queries. Queries see what precedes them, so that the problem is causal or has one query. lse, if
/// wanted, is 0. The side input `initial_state` is what a fresh state begins with.
RunReport attend_recurrent(const RecurrentLayer& layer, const Problem& problem, const AttentionInputs& inputs,
                           const AttentionOutputs& outputs, const PlanContext& context, const GateRule& rule);

/// Gradients of attend_recurrent() by q, k, v and all side inputs, for a call that began with a fresh state: another
/// beginning comes as `initial_state`, and its gradient is that of the earlier tokens' last state. What the forward
/// call did is computed again. Throws Error for a state that has seen other tokens, and for keys in pages.
RunReport backward_recurrent(const RecurrentLayer& layer, const Problem& problem, const AttentionInputs& inputs,
                             const SavedForward& saved, const Gradients& gradients, const PlanContext& context,
                             const GateRule& rule);

/// Side inputs that several methods declare.
std::vector<SideInputInfo> convolution_side_inputs();
std::vector<SideInputInfo> output_side_inputs(std::string_view curve);
SideInputInfo initial_state_side_input();

}  // namespace tessera
