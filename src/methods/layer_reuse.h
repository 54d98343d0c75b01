// Decoding that chooses keys in a few layers and lets the layers after them read the same keys: what TidalDecode and
// DELTA share. They differ in which layers choose and in how scores become a choice.
#pragma once

#include <functional>

#include "score/selection.h"
#include "tessera/method.h"

namespace tessera {

/// What a layer does in a decoding step.
enum class LayerMode : std::uint8_t {
  full,     ///< dense
  publish,  ///< dense, and its scores become the choice of the layers after it
  reuse     ///< only the keys of the last choice of this step
};

/// Scores f32 [B, Hq, 1, Nk] (natural units) and LSE [B * Hq] of a dense layer -> the keys of the next layers.
using ChooseKeys = std::function<score::Selection(const Problem& problem, const TensorView& scores,
                                                  std::span<const float> lse, int threads)>;

/// The last choice, and memory for scores.
class LayerReuseState final : public MethodState {
 public:
  score::Selection selection;
  std::int64_t layer = -1;  ///< that published it
  std::vector<float> scores;
  std::vector<float> lse;
};

/// True for a decoding step: one query per sequence, which may see every key. Everything else runs dense.
bool is_decoding_step(const Problem& problem);

/// The plan of a layer: the last choice in mode reuse if an earlier layer of this step made one, else dense.
Plan plan_with_reuse(LayerMode mode, const Problem& problem, const PlanContext& context);
/// Plans and runs; a publishing layer chooses after it ran. Its output is that of dense attention, bit by bit.
RunReport attend_with_reuse(LayerMode mode, const ChooseKeys& choose, const Problem& problem,
                            const AttentionInputs& inputs, const AttentionOutputs& outputs, const PlanContext& context,
                            Plan* executed);

}  // namespace tessera
