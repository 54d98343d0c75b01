// One call of a recurrent method, made ready for the recurrence: what the forward and the backward pass share.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "methods/recurrent_attention.h"

namespace tessera {

/// A float tensor and its view.
struct OwnRows {
  std::vector<float> values;
  MutableTensorView view;

  explicit OwnRows(const std::array<std::int64_t, 4>& shape)
      : values(static_cast<std::size_t>(shape[0] * shape[1] * shape[2] * shape[3])),
        view(mutable_view_of(values.data(), DType::f32, shape)) {}
};

/// Tokens of one sequence on a tensor's token axis.
struct TokenRange {
  std::int64_t batch = 0;
  std::int64_t first = 0;
  std::int64_t count = 0;
};

/// What a call adds to the states.
struct CallTokens {
  std::vector<std::int64_t> seen;  ///< per sequence: tokens of its state
  std::vector<std::int64_t> skip;  ///< per sequence: keys that its state has seen
  std::int64_t shift = 0;          ///< uniform batches: the common skip, by which k and v are cut
  std::int64_t tokens = 0;         ///< length of the token axis after the cut
};

/// The layer's entry of the caller's state, made on its first call; null without a state.
RecurrentMethodState::Layer* layer_state(std::string_view method, const Problem& problem, const PlanContext& context);

/// Checks a call, reads its side inputs, and transforms queries, keys and values as the layer does before the
/// recurrence.
class RecurrentCall {
 public:
  /// `kept` is the layer's state, whose tails of convolutions move on; null: a fresh one that is dropped.
  RecurrentCall(const RecurrentLayer& layer, const Problem& problem, const AttentionInputs& inputs,
                const PlanContext& context, const GateRule& rule, RecurrentMethodState::Layer* kept);
  RecurrentCall(const RecurrentCall&) = delete;
  RecurrentCall& operator=(const RecurrentCall&) = delete;

  /// Whether q, k or v goes through the convolution of that name, and else through SiLU.
  bool convolves(std::string_view name) const { return layer.convolutions && side.has(name); }
  bool activates(std::string_view name) const { return layer.silu && name != "conv_v" && !convolves(name); }
  /// Whether outputs pass a norm or a gate.
  bool finishes() const { return layer.norm != OutputNorm::none || side.has("output_gate"); }
  /// Numbers of the side input `initial_state`, empty where there is none.
  std::vector<float> initial_states() const;

  const RecurrentLayer& layer;
  const Problem& problem;
  int threads;
  CallTokens added;
  SideReader side;
  std::vector<TokenRange> tokens;   ///< of every sequence on the axis of the keys, after the cut
  std::vector<TokenRange> queries;  ///< of every sequence on the axis of the queries
  RecurrentGates gates;
  RecurrentInputs given;  ///< what the recurrence reads
  RecurrentProblem recurrent;
  RecurrentOptions options;

 private:
  void replace(TensorView& view, const char* name, const std::vector<TokenRange>& ranges,
               RecurrentMethodState::Layer* kept);

  std::array<std::vector<std::byte>, 2> storage_;
  std::vector<OwnRows> streams_;
};

/// Weights of the norm of the outputs, [value_dim] or [q_heads * value_dim]; empty: all 1.
std::vector<float> norm_weights(const RecurrentCall& call);
/// Norm, its weights and the output gate, on float outputs [B, heads, Nq, Dv].
void finish_outputs(RecurrentCall& call, const OwnRows& o, const MutableTensorView& target);

}  // namespace tessera
