#include "kernels/peak.h"

#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <numeric>
#include <vector>

#include "core/parallel.h"
#include "kernels/cpu/aligned_buffer.h"
#include "kernels/cpu/cpu.h"

namespace tessera::kernels {

namespace {

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

double product_pass(Isa isa, DType compute, int threads, int rounds) {
  constexpr std::int64_t iterations = 4'000'000;
  const LevelKernels& level = level_of(isa);
  const bool pairs = level.pairs_bf16 && compute == DType::bf16;
  const int team = thread_count(threads);
  std::vector<float> sinks(static_cast<std::size_t>(team));
  std::vector<double> operations(static_cast<std::size_t>(team));
  const auto start = std::chrono::steady_clock::now();
#pragma omp parallel num_threads(team)
  {
    const auto t = static_cast<std::size_t>(omp_get_thread_num());
    operations[t] = level.product_loop(rounds * iterations, pairs, &sinks[t]);
  }
  return std::accumulate(operations.begin(), operations.end(), 0.0) / seconds_since(start) / 1e9;
}

double measure_peak_gflops(Isa isa, DType compute, int threads) {
  constexpr int passes = 7;
  double best = 0;
  for (int pass = 0; pass < passes; ++pass) best = std::max(best, product_pass(isa, compute, threads, 1));
  return best;
}

struct MemoryReader::Buffer {
  static constexpr std::int64_t floats = std::int64_t{1} << 27;  // 512 MiB
  AlignedBuffer memory{floats * sizeof(float)};
};

MemoryReader::MemoryReader(int threads) : threads_(thread_count(threads)), buffer_(std::make_unique<Buffer>()) {
  std::fill_n(reinterpret_cast<float*>(buffer_->memory.data()), Buffer::floats, 1.0F);
}

MemoryReader::~MemoryReader() = default;

double MemoryReader::pass() {
  const LevelKernels& level = level_of(supported_isas().back());
  const auto* floats = reinterpret_cast<const float*>(buffer_->memory.data());
  std::vector<float> sinks(static_cast<std::size_t>(threads_));
  const auto start = std::chrono::steady_clock::now();
#pragma omp parallel num_threads(threads_)
  {
    const int t = omp_get_thread_num();
    const std::int64_t share = Buffer::floats / threads_;
    sinks[static_cast<std::size_t>(t)] = level.read_loop(floats + share * t, share);
  }
  return static_cast<double>(Buffer::floats) * sizeof(float) / seconds_since(start) / 1e9;
}

double measure_read_bandwidth(int threads) {
  constexpr int passes = 7;
  MemoryReader reader(threads);
  double best = 0;
  for (int pass = 0; pass < passes; ++pass) best = std::max(best, reader.pass());
  return best;
}

}  // namespace tessera::kernels
