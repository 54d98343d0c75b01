// The avx512_bf16 backward kernel text on emulated intrinsics.
#define TESSERA_EMULATE_AVX512
#define TESSERA_LEVEL_AVX512
#define TESSERA_LEVEL_BF16

#include "kernels/cpu/level_headers.h"
#include "kernels/emulated_levels.h"

namespace tessera::kernels {
namespace {
#include "kernels/cpu/level_backward-inl.h"
}  // namespace

const BackwardKernels& emulated_avx512_bf16_backward() {
  static constexpr BackwardKernels kernels = backward_table();
  return kernels;
}

}  // namespace tessera::kernels
