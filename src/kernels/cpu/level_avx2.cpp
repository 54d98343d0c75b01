// The kernel text built for avx2; see level-inl.h.
#define TESSERA_LEVEL_AVX2

#if defined(__x86_64__)
#include "kernels/cpu/level_headers.h"

namespace tessera::kernels {
namespace {
#include "kernels/cpu/level-inl.h"
}  // namespace

const LevelKernels& level_avx2() {
  static constexpr LevelKernels kernels = level_table(backward_avx2);
  return kernels;
}

}  // namespace tessera::kernels
#endif
