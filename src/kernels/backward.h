// The contract of the backward kernels: like that of the forward ones, on checked tensors.
#pragma once

#include <cstddef>

#include "kernels/kernels.h"
#include "tessera/gradient.h"

namespace tessera::kernels {

/// One backward call. `call` carries plan, inputs and options; its outputs are not used.
struct BackwardCall {
  const Call& call;
  const SavedForward& saved;
  const Gradients& gradients;

  const Problem& problem() const { return call.problem(); }
  float d_lse(std::int64_t index) const {
    return saved.d_lse.empty() ? 0.0F : saved.d_lse[static_cast<std::size_t>(index)];
  }
};

/// Element of d_key_bias that receives the gradient of (sequence, query head, key), as an offset into its rows.
inline std::int64_t bias_head_of(const BackwardCall& call, std::int64_t q_head) {
  return q_head * call.gradients.d_key_bias.shape[1] / call.problem().q_heads;
}

/// Naive float64 evaluation, pair by pair: the oracle of the tests.
void run_reference_backward(const BackwardCall& call);

/// Sets all wanted gradients to 0.
void clear_gradients(const BackwardCall& call);

}  // namespace tessera::kernels
