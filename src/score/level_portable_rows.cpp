// Softmax arithmetic of rows built for portable; see exponential-inl.h.
#include "score/row_levels.h"

namespace tessera::score {
namespace {
namespace own {
#include "score/exponential-inl.h"
}  // namespace own
}  // namespace

const RowLevel& rows_portable() {
  static constexpr RowLevel level{own::row_maximum, own::exponentiate, own::row_sum};
  return level;
}

}  // namespace tessera::score
