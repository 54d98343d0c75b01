// Checks an answer against the float64 reference on sampled query tiles: a benchmark of a wrong kernel is worth
// nothing.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "tessera/attention.h"
#include "tessera/gradient.h"

namespace tessera::cli {

/// Compares outputs of run(plan, inputs) with the reference on the first, the last and a random query tile of a few
/// heads (at most 16 rows of each, its first and last among them). Throws Error that names `what` when the relative L2
/// error of the sampled rows or the error of an LSE exceeds what the dtypes allow. Uniform batches only.
void verify_samples(std::string_view what, const Plan& plan, const AttentionInputs& inputs,
                    const AttentionOutputs& outputs);

/// The same for dQ of run_backward(plan, inputs, saved), against the float64 reference backward pass.
void verify_gradient_samples(std::string_view what, const Plan& plan, const AttentionInputs& inputs,
                             const SavedForward& saved, const TensorView& d_q);

}  // namespace tessera::cli
