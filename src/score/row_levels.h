// The tables of the instruction sets behind exponential.h.
#pragma once

#include "score/exponential.h"

namespace tessera::score {

const RowLevel& rows_portable();
const RowLevel& rows_avx2();
const RowLevel& rows_avx512();

}  // namespace tessera::score
