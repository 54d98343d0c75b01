// The kernel text of gathered scores and of scores by changes built for avx512; see gathered-inl.h and delta-inl.h.
#define TESSERA_LEVEL_AVX512

#if defined(__x86_64__)
#include "kernels/cpu/level_headers.h"
#include "score/gathered_levels.h"

namespace tessera::kernels {
namespace {
#include "score/gathered-inl.h"
//
#include "score/delta-inl.h"
}  // namespace
}  // namespace tessera::kernels

namespace tessera::score {

const GatheredLevel& gathered_avx512() {
  static constexpr GatheredLevel level{kernels::largest_of_keys<kernels::FloatProduct>, nullptr};
  return level;
}

const DeltaLevel& delta_avx512() {
  static constexpr DeltaLevel level{kernels::running_scores<16 / kernels::kLanes>,
                                    kernels::running_scores<64 / kernels::kLanes>};
  return level;
}

}  // namespace tessera::score
#endif
