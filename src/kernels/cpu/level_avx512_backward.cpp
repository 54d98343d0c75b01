// The backward kernel text built for avx512; see level_backward-inl.h.
#define TESSERA_LEVEL_AVX512

#if defined(__x86_64__)
#include "kernels/cpu/level_headers.h"

namespace tessera::kernels {
namespace {
#include "kernels/cpu/level_backward-inl.h"
}  // namespace

const BackwardKernels& backward_avx512() {
  static constexpr BackwardKernels kernels = backward_table();
  return kernels;
}

}  // namespace tessera::kernels
#endif
