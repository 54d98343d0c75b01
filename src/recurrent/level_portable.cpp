// The kernel text built for portable; see level-inl.h.

#include "kernels/cpu/level_headers.h"
#include "recurrent/chunk.h"

namespace tessera::recurrent {
namespace {
#include "recurrent/level-inl.h"
}  // namespace

const LevelKernels& level_portable() {
  static constexpr LevelKernels kernels = level_table();
  return kernels;
}

}  // namespace tessera::recurrent
