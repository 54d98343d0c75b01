// The backward kernel text built for avx512_bf16; see level_backward-inl.h.
#define TESSERA_LEVEL_AVX512
#define TESSERA_LEVEL_BF16

#if defined(__x86_64__)
#include "kernels/cpu/level_headers.h"

namespace tessera::kernels {
namespace {
#include "kernels/cpu/level_backward-inl.h"
}  // namespace

const BackwardKernels& backward_avx512_bf16() {
  static constexpr BackwardKernels kernels = backward_table();
  return kernels;
}

}  // namespace tessera::kernels
#endif
