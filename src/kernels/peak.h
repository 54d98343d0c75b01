// What this machine can do at best, measured now: the yardstick of every benchmark.
#pragma once

#include "tessera/attention.h"

namespace tessera::kernels {

/// GFLOP/s of the product instruction that `isa` uses for inputs of `compute` dtype (bf16 pairs where it has them, else
/// float fused multiply-adds), on registers only, `threads` threads (0: all). Best of several short rounds.
double measure_peak_gflops(Isa isa, DType compute, int threads);

/// Bytes per second (GB/s) at which `threads` threads read a buffer far larger than the caches.
double measure_read_bandwidth(int threads);

}  // namespace tessera::kernels
