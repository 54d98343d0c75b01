#include "score/exponential.h"

#include "score/row_levels.h"
#include "tessera/attention.h"

namespace tessera::score {

namespace {

const RowLevel& level_of(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx2:
      return rows_avx2();
    case Isa::avx512:
    case Isa::avx512_bf16:
      return rows_avx512();
#endif
    default:
      return rows_portable();
  }
}

}  // namespace

const RowLevel& row_level() {
  static const RowLevel& level = level_of(default_isa());  // all give the same bits
  return level;
}

}  // namespace tessera::score
