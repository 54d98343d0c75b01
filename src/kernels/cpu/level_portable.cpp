// The kernel text built for portable; see level-inl.h.

#include "kernels/cpu/level_headers.h"

namespace tessera::kernels {
namespace {
#include "kernels/cpu/level-inl.h"
}  // namespace

const LevelKernels& level_portable() {
  static constexpr LevelKernels kernels = level_table(backward_portable);
  return kernels;
}

}  // namespace tessera::kernels
