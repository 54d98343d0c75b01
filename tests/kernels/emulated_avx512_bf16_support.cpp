// The avx512_bf16 kernel text on emulated intrinsics.
#define TESSERA_EMULATE_AVX512
#define TESSERA_LEVEL_AVX512
#define TESSERA_LEVEL_BF16

#include "kernels/cpu/level_headers.h"
#include "kernels/emulated_levels.h"

namespace tessera::kernels {
namespace {
#include "kernels/cpu/level-inl.h"
}  // namespace

const LevelKernels& emulated_avx512_bf16() {
  static constexpr LevelKernels kernels = level_table(emulated_avx512_bf16_backward);
  return kernels;
}

}  // namespace tessera::kernels
