// The search for retrieval heads of DuoAttention (Efficient Long-Context LLM Inference with Retrieval and Streaming
// Heads, arXiv:2410.10819): one gate per layer and kv head, learned so that the model's last hidden states stay while
// as many heads as possible see sinks and recent tokens only.
//
// As the authors' code does it: the full attention that a gate mixes in is that of the unchanged model, a constant; the
// streaming attention is that of the mixed model's own queries, keys and values, and gradients flow through it.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "model/differentiable.h"
#include "tune/prompts.h"

namespace tessera::tune {

/// [layer][kv head]
using Gates = std::vector<std::vector<double>>;

/// How far the last hidden states move when attention is gate * full + (1 - gate) * streaming.
class GateObjective {
 public:
  /// Streaming heads see keys j <= p with j < sink or p - j < recent. The model must outlive it.
  GateObjective(model::DifferentiableModel& model, std::int64_t sink, std::int64_t recent, const RunOptions& run = {});
  ~GateObjective();

  /// Mean over the tokens of the answers of the mean squared difference of their hidden states; its gradient replaces
  /// `gradient` unless that is null. Throws Error for a prompt without answers and for gates of another shape.
  double evaluate(const Prompt& prompt, const Gates& gates, Gates* gradient);

 private:
  class Mixture;
  model::DifferentiableModel& model_;
  std::unique_ptr<Mixture> mixture_;
};

struct GateSearch {
  std::int64_t sink = 128;
  std::int64_t recent = 256;
  std::int64_t steps = 2000;
  double learning_rate = 0.02;
  double penalty = 0.05;  ///< lambda: weight of the mean of the gates
  double warm_up = 0.2;   ///< share of the steps over which the learning rate grows, and at the end falls
  double floor = 0.1;     ///< least share of the learning rate
  double initial = 1;     ///< gates before the first step
};

struct LearnedGates {
  Gates gates;                     ///< in [0, 1]
  std::vector<double> deviations;  ///< the objective at each step
};

/// Share of the learning rate at a step.
double learning_rate_share(const GateSearch& search, std::int64_t step);

/// AdamW without weight decay on objective + penalty * mean of the gates, one prompt per step, gates clamped to [0, 1]
/// before every pass. `prompt_of` makes the prompt of a step; `on_step` is told of every step and may throw to end it.
LearnedGates learn_gates(model::DifferentiableModel& model, const GateSearch& search,
                         const std::function<Prompt(std::int64_t step)>& prompt_of,
                         const std::function<void(std::int64_t step)>& on_step, const RunOptions& run = {});

}  // namespace tessera::tune
