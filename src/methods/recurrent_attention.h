// What the recurrent methods share: which tokens a call adds, side inputs, states across calls, the layer's other
// steps.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <vector>

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

/// Reads the side inputs of one call for the tokens that it adds. Throws Error naming the method, the tensor and the
/// expected shape.
class SideReader {
 public:
  /// Tokens [first, first + tokens) of `all` on the axis of the keys.
  SideReader(std::string_view method, const Problem& problem, const AttentionInputs& inputs, std::int64_t first,
             std::int64_t tokens);

  std::int64_t batch() const { return batch_; }
  std::int64_t tokens() const { return tokens_; }
  /// [B, heads, N, width] with q_heads or kv_heads; for width 1 also [B, heads, N]. N is the keys of the call or the
  /// added ones. Null if absent.
  const TensorView* optional_rows(std::string_view name, std::int64_t width);
  const TensorView& rows(std::string_view name, std::int64_t width);
  /// [q_heads, ...] numbers per head, e.g. [q_heads, head_dim]; with the shape as text. `fallback` where it is absent.
  std::vector<float> per_head(std::string_view name, std::int64_t width, float fallback) const;
  std::vector<float> vector(std::string_view name, std::int64_t size) const;
  bool has(std::string_view name) const { return inputs_.find_side(name) != nullptr; }
  /// Weights [heads, width, dim] of a convolution; the width is returned.
  std::vector<float> convolution(std::string_view name, std::int64_t heads, std::int64_t dim,
                                 std::int64_t& width) const;

 private:
  std::vector<float> numbers(std::string_view name, const std::array<std::int64_t, 4>& shape) const;

  std::string_view method_;
  const Problem& problem_;
  const AttentionInputs& inputs_;
  std::int64_t first_;
  std::int64_t tokens_;
  std::int64_t batch_;
  std::map<std::string, TensorView, std::less<>> views_;
};

/// Decays and betas of a call; the vectors own what the views look at, where they were computed.
struct RecurrentGates {
  TensorView decay = {};
  TensorView beta = {};
  std::vector<float> decay_values = {};
  std::vector<float> beta_values = {};
};
using MakeGates = std::function<void(SideReader&, RecurrentGates&)>;

/// beta = curve(side input `beta`), or that itself.
void make_betas(SideReader& side, BetaGate gate, RecurrentGates& gates);
/// Decays curve(a, bias, a_log) of the side inputs `g` [B, heads, N, width], `dt_bias` [q_heads, width] and `A_log`
/// [q_heads], the last two 0 where absent.
void make_decays(SideReader& side, std::int64_t q_heads, std::int64_t width, int threads,
                 const std::function<float(float, float, float)>& curve, RecurrentGates& gates);

/// One call of a recurrent method.
///
/// Which tokens it adds: with as many queries as keys all of them, continuing from the state; with more keys either
/// those that the state has not seen, which must be as many as the queries, or, with a fresh state, all keys, of which
/// the last have queries. Queries see what precedes them, so that the problem is causal or has one query. lse, if
/// wanted, is 0.
RunReport attend_recurrent(const RecurrentLayer& layer, const Problem& problem, const AttentionInputs& inputs,
                           const AttentionOutputs& outputs, const PlanContext& context, const MakeGates& make_gates);

/// Side inputs that several methods declare.
std::vector<SideInputInfo> convolution_side_inputs();
std::vector<SideInputInfo> output_side_inputs(std::string_view curve);

}  // namespace tessera
