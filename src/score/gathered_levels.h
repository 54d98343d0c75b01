// The kernel tables of the instruction sets behind gathered_scores.h and delta_keys.h.
#pragma once

#include "score/delta_keys.h"
#include "score/gathered_scores.h"

namespace tessera::score {

const GatheredLevel& gathered_portable();
const GatheredLevel& gathered_avx2();
const GatheredLevel& gathered_avx512();
const GatheredLevel& gathered_avx512_bf16();
const GatheredLevel& gathered_neon();

const DeltaLevel& delta_portable();
const DeltaLevel& delta_avx2();
const DeltaLevel& delta_avx512();
const DeltaLevel& delta_neon();

}  // namespace tessera::score
