// The fused CPU kernels: common scheduling around the kernel text of one instruction set.
#pragma once

#include "kernels/backward.h"
#include "kernels/cpu/tile.h"
#include "kernels/kernels.h"

namespace tessera::kernels {

/// Kernel table of an instruction set (which this machine must be able to run).
const LevelKernels& level_of(Isa isa);

/// Each returns the bytes of packed panels and scratch it held at most. `skipped_pairs`, if not null, receives what the
/// online skip left out.
std::size_t run_query_major(const Call& call, const LevelKernels& level, std::int64_t* skipped_pairs = nullptr);
std::size_t run_key_major(const Call& call, const LevelKernels& level);
std::size_t run_split_key(const Call& call, const LevelKernels& level);

/// Gradients of all rows; on cleared gradients. `key_major` needs a plan that can_run_key_major.
std::size_t run_cpu_backward(const BackwardCall& backward, const LevelKernels& level, bool key_major);

/// Key-major walks whole key tiles of source 0 in their natural order; this says whether a plan has only those.
bool can_run_key_major(const Plan& plan);

}  // namespace tessera::kernels
