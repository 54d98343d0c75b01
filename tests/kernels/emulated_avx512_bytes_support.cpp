// The avx512 text of quantised kernels on emulated intrinsics.
#define TESSERA_EMULATE_AVX512
#define TESSERA_LEVEL_AVX512

#include "kernels/cpu/bytes.h"
#include "kernels/cpu/level_headers.h"
#include "kernels/emulated_bytes.h"
#include "support/emulate_avx512.h"

namespace tessera::kernels {
namespace {
#include "kernels/cpu/level_bytes-inl.h"
}  // namespace

const ByteKernels& emulated_avx512_bytes() {
  static constexpr ByteKernels kernels = byte_table();
  return kernels;
}

}  // namespace tessera::kernels
