// The text of quantised kernels built for avx512; see level_bytes-inl.h.
#define TESSERA_LEVEL_AVX512

#if defined(__x86_64__)
#include "kernels/cpu/bytes.h"
#include "kernels/cpu/level_headers.h"

namespace tessera::kernels {
namespace {
#include "kernels/cpu/level_bytes-inl.h"
}  // namespace

const ByteKernels& bytes_avx512() {
  static constexpr ByteKernels kernels = byte_table();
  return kernels;
}

}  // namespace tessera::kernels
#endif
