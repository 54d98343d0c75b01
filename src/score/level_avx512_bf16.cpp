// The kernel text of gathered scores built for avx512_bf16; see gathered-inl.h.
#define TESSERA_LEVEL_AVX512
#define TESSERA_LEVEL_BF16

#if defined(__x86_64__)
#include "kernels/cpu/level_headers.h"
#include "score/gathered_levels.h"

namespace tessera::kernels {
namespace {
#include "score/gathered-inl.h"
}  // namespace
}  // namespace tessera::kernels

namespace tessera::score {

const GatheredLevel& gathered_avx512_bf16() {
  static constexpr GatheredLevel level{kernels::largest_of_keys<kernels::FloatProduct>,
                                       kernels::largest_of_keys<kernels::PairProduct>};
  return level;
}

}  // namespace tessera::score
#endif
