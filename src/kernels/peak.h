// What this machine can do at best, measured now: the yardstick of every benchmark.
#pragma once

#include <memory>

#include "tessera/attention.h"

namespace tessera::kernels {

/// GFLOP/s of the product instruction that `isa` uses for inputs of `compute` dtype (bf16 pairs where it has them, else
/// float fused multiply-adds), on registers only, `threads` threads (0: all), in `rounds` rounds of about 30 ms. A
/// kernel is judged by passes taken in turn with it: what a shared host gives changes within a second.
double product_pass(Isa isa, DType compute, int threads, int rounds);

/// The best of several rounds.
double measure_peak_gflops(Isa isa, DType compute, int threads);

/// Reads a buffer far larger than the caches, pass by pass: memory is shared with whatever else the host runs, and what
/// it gives may double within a second, so that a kernel is judged by passes taken in turn with it.
class MemoryReader {
 public:
  /// 0 threads: all.
  explicit MemoryReader(int threads);
  ~MemoryReader();
  MemoryReader(const MemoryReader&) = delete;
  MemoryReader& operator=(const MemoryReader&) = delete;
  /// GB/s of one pass.
  double pass();

 private:
  struct Buffer;
  int threads_;
  std::unique_ptr<Buffer> buffer_;
};

/// GB/s at which `threads` threads read from memory: the best of several passes.
double measure_read_bandwidth(int threads);

}  // namespace tessera::kernels
