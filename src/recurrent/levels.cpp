// The kernel table of each instruction set.
#include "recurrent/chunk.h"

namespace tessera::recurrent {

const LevelKernels& level_of(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx2:
      return level_avx2();
    case Isa::avx512:
    case Isa::avx512_bf16:
      return level_avx512();
#elif defined(__aarch64__)
    case Isa::neon:
      return level_neon();
#endif
    default:
      return level_portable();
  }
}

}  // namespace tessera::recurrent
