// The backward kernel text built for neon; see level_backward-inl.h.
#define TESSERA_LEVEL_NEON

#if defined(__aarch64__)
#include "kernels/cpu/level_headers.h"

namespace tessera::kernels {
namespace {
#include "kernels/cpu/level_backward-inl.h"
}  // namespace

const BackwardKernels& backward_neon() {
  static constexpr BackwardKernels kernels = backward_table();
  return kernels;
}

}  // namespace tessera::kernels
#endif
