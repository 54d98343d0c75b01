// The kernel tables of the instruction sets behind gathered_scores.h.
#pragma once

#include "score/gathered_scores.h"

namespace tessera::score {

const GatheredLevel& gathered_portable();
const GatheredLevel& gathered_avx2();
const GatheredLevel& gathered_avx512();
const GatheredLevel& gathered_avx512_bf16();

}  // namespace tessera::score
