// The kernel text of gathered scores built for portable; see gathered-inl.h.

#include "kernels/cpu/level_headers.h"
#include "score/gathered_levels.h"

namespace tessera::kernels {
namespace {
#include "score/gathered-inl.h"
}  // namespace
}  // namespace tessera::kernels

namespace tessera::score {

const GatheredLevel& gathered_portable() {
  static constexpr GatheredLevel level{kernels::largest_of_keys<kernels::FloatProduct>, nullptr};
  return level;
}

}  // namespace tessera::score
