// Softmax arithmetic of rows built for avx2; see exponential-inl.h.
#if defined(__x86_64__)
#include "score/row_levels.h"

namespace tessera::score {
namespace {
namespace own {
#include "score/exponential-inl.h"
}  // namespace own
}  // namespace

const RowLevel& rows_avx2() {
  static constexpr RowLevel level{own::row_maximum, own::exponentiate, own::row_sum};
  return level;
}

}  // namespace tessera::score
#endif
