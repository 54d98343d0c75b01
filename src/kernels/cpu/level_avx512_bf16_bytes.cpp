// The text of quantised kernels built for avx512_bf16; see level_bytes-inl.h.
#define TESSERA_LEVEL_AVX512
#define TESSERA_LEVEL_BF16

#if defined(__x86_64__)
#include "kernels/cpu/bytes.h"
#include "kernels/cpu/level_headers.h"

namespace tessera::kernels {
namespace {
#include "kernels/cpu/level_bytes-inl.h"
}  // namespace

const ByteKernels& bytes_avx512_bf16() {
  static constexpr ByteKernels kernels = byte_table();
  return kernels;
}

}  // namespace tessera::kernels
#endif
