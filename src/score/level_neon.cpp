// The kernel text of gathered scores and of scores by changes built for neon; see gathered-inl.h and delta-inl.h.
#define TESSERA_LEVEL_NEON

#if defined(__aarch64__)
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

const GatheredLevel& gathered_neon() {
  static constexpr GatheredLevel level{kernels::largest_of_keys<kernels::FloatProduct>, nullptr};
  return level;
}

const DeltaLevel& delta_neon() {
  static constexpr DeltaLevel level{kernels::running_scores<16 / kernels::kLanes>,
                                    kernels::running_scores<64 / kernels::kLanes>};
  return level;
}

}  // namespace tessera::score
#endif
