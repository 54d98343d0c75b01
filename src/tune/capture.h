// What the layers of a model attend to when it reads a prompt.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string_view>
#include <vector>

#include "tessera/attention.h"
#include "tune/tuner.h"

namespace tessera::tune {

/// Q [1, q_heads, N, head_dim], K and V [1, kv_heads, N, head_dim] of one layer, f32, causal.
struct LayerTensors {
  Problem problem;
  std::vector<float> q, k, v;
  /// Views of this object.
  AttentionInputs inputs() const;
};

/// Dense prefill of the tokens; the layers come in order, each once. Holds one layer at a time. `phase` names the work
/// to the task. Throws Error for tokens that the model cannot read, and Cancelled.
void for_each_layer(const TuningTask& task, std::span<const std::int32_t> tokens, std::string_view phase,
                    const std::function<void(std::int64_t layer, const LayerTensors& tensors)>& body);

/// The same for several prompts: body gets the index of the prompt too.
void for_each_layer(
    const TuningTask& task, std::span<const std::vector<std::int32_t>> prompts, std::string_view phase,
    const std::function<void(std::size_t prompt, std::int64_t layer, const LayerTensors& tensors)>& body);

}  // namespace tessera::tune
