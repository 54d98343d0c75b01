// The text of quantised kernels built for portable; see level_bytes-inl.h.

#include "kernels/cpu/bytes.h"
#include "kernels/cpu/level_headers.h"

namespace tessera::kernels {
namespace {
#include "kernels/cpu/level_bytes-inl.h"
}  // namespace

const ByteKernels& bytes_portable() {
  static constexpr ByteKernels kernels = byte_table();
  return kernels;
}

}  // namespace tessera::kernels
