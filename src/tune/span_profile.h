// The profile of MoA (Mixture of Sparse Attention, arXiv:2406.14909): how much the loss of a model's answers depends on
// each block of each head, by gradient; and the loss under a choice of spans.
#pragma once

#include <cstdint>
#include <vector>

#include "model/differentiable.h"
#include "tessera/method.h"
#include "tune/prompts.h"

namespace tessera::tune {

/// Signed influence of every (layer, query head), layer by layer, on the mean cross entropy of the tokens of the
/// prompt's first answer: [layers * q_heads][blocks * blocks] as block_influence() gives it, from one forward and one
/// backward pass with dense attention. Throws Error for a prompt without an answer.
std::vector<std::vector<double>> profile_influence(model::DifferentiableDecoder& decoder, std::int64_t q_heads,
                                                   const Prompt& prompt, const RunOptions& run = {});

/// Mean cross entropy of the tokens of the prompt's first answer when the layers attend by a method.
double answer_loss(model::DifferentiableDecoder& decoder, const Prompt& prompt, const Method& method,
                   const RunOptions& run = {});

}  // namespace tessera::tune
