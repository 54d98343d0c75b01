// The kernel text of gathered scores built for avx2; see gathered-inl.h.
#define TESSERA_LEVEL_AVX2

#if defined(__x86_64__)
#include "kernels/cpu/level_headers.h"
#include "score/gathered_levels.h"

namespace tessera::kernels {
namespace {
#include "score/gathered-inl.h"
}  // namespace
}  // namespace tessera::kernels

namespace tessera::score {

const GatheredLevel& gathered_avx2() {
  static constexpr GatheredLevel level{kernels::largest_of_keys<kernels::FloatProduct>, nullptr};
  return level;
}

}  // namespace tessera::score
#endif
