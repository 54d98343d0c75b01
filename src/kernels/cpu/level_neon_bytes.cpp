// The text of quantised kernels built for neon; see level_bytes-inl.h.
#define TESSERA_LEVEL_NEON

#if defined(__aarch64__)
#include "kernels/cpu/bytes.h"
#include "kernels/cpu/level_headers.h"

namespace tessera::kernels {
namespace {
#include "kernels/cpu/level_bytes-inl.h"
}  // namespace

const ByteKernels& bytes_neon() {
  static constexpr ByteKernels kernels = byte_table();
  return kernels;
}

}  // namespace tessera::kernels
#endif
