// The kernel text built for avx512_bf16; see level-inl.h.
#define TESSERA_LEVEL_AVX512
#define TESSERA_LEVEL_BF16

#if defined(__x86_64__)
#include "kernels/cpu/level_headers.h"

namespace tessera::kernels {
namespace {
#include "kernels/cpu/level-inl.h"
}  // namespace

const LevelKernels& level_avx512_bf16() {
  static constexpr LevelKernels kernels = level_table(backward_avx512_bf16);
  return kernels;
}

}  // namespace tessera::kernels
#endif
