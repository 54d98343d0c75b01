// The backward kernel text built for portable; see level_backward-inl.h.

#include "kernels/cpu/level_headers.h"

namespace tessera::kernels {
namespace {
#include "kernels/cpu/level_backward-inl.h"
}  // namespace

const BackwardKernels& backward_portable() {
  static constexpr BackwardKernels kernels = backward_table();
  return kernels;
}

}  // namespace tessera::kernels
