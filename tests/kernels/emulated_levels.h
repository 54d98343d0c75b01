// Kernel tables of instruction sets that this machine may lack, on emulated intrinsics.
#pragma once

#include "kernels/cpu/backward.h"
#include "kernels/cpu/tile.h"

namespace tessera::kernels {

const LevelKernels& emulated_avx512();
const LevelKernels& emulated_avx512_bf16();
const BackwardKernels& emulated_avx512_backward();
const BackwardKernels& emulated_avx512_bf16_backward();

}  // namespace tessera::kernels
