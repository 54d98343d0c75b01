// The fused CPU kernels: common scheduling around the kernel text of one instruction set.
#pragma once

#include "kernels/cpu/tile.h"
#include "kernels/kernels.h"

namespace tessera::kernels {

/// Kernel table of an instruction set (which this machine must be able to run).
const LevelKernels& level_of(Isa isa);

/// Each returns the bytes of packed panels and scratch it held at most.
std::size_t run_query_major(const Call& call, const LevelKernels& level);
std::size_t run_key_major(const Call& call, const LevelKernels& level);
std::size_t run_split_key(const Call& call, const LevelKernels& level);

/// Key-major walks whole key tiles of source 0 in their natural order; this says whether a plan has only those.
bool can_run_key_major(const Plan& plan);

}  // namespace tessera::kernels
