// The kernel text built for neon; see level-inl.h.
#define TESSERA_LEVEL_NEON

#if defined(__aarch64__)
#include "kernels/cpu/level_headers.h"

namespace tessera::kernels {
namespace {
#include "kernels/cpu/level-inl.h"
}  // namespace

const LevelKernels& level_neon() {
  static constexpr LevelKernels kernels = level_table(backward_neon);
  return kernels;
}

}  // namespace tessera::kernels
#endif
