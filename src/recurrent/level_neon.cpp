// The kernel text built for neon; see level-inl.h.
#define TESSERA_LEVEL_NEON

#if defined(__aarch64__)
#include "kernels/cpu/level_headers.h"
#include "recurrent/chunk.h"

namespace tessera::recurrent {
namespace {
#include "recurrent/level-inl.h"
}  // namespace

const LevelKernels& level_neon() {
  static constexpr LevelKernels kernels = level_table();
  return kernels;
}

}  // namespace tessera::recurrent
#endif
