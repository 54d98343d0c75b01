// Tables of quantised kernels of instruction sets that this machine may lack, on emulated intrinsics.
#pragma once

#include "kernels/cpu/bytes.h"

namespace tessera::kernels {

const ByteKernels& emulated_avx512_bytes();
const ByteKernels& emulated_avx512_bf16_bytes();

}  // namespace tessera::kernels
