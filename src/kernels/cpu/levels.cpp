// The kernel table of each instruction set.
#include "core/error.h"
#include "kernels/cpu/cpu.h"

namespace tessera::kernels {

const LevelKernels& level_of(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx2:
      return level_avx2();
    case Isa::avx512:
      return level_avx512();
    case Isa::avx512_bf16:
      return level_avx512_bf16();
#elif defined(__aarch64__)
    case Isa::neon:
      return level_neon();
#endif
    default:
      return level_portable();
  }
}

}  // namespace tessera::kernels
