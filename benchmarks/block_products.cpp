// Decoding from weights in ggml blocks: one row of activations times a matrix far larger than the caches. GB/s of
// weights read, and the share of the read bandwidth measured in the same run.
#include <benchmark/benchmark.h>

#include <random>
#include <vector>

#include "io/ggml_blocks.h"
#include "kernels/block_product.h"
#include "kernels/peak.h"

namespace {

using tessera::GgmlType;

constexpr std::int64_t kInputs = 2048;
constexpr std::int64_t kOutputs = 65536;

double bandwidth() {
  static const double measured = tessera::kernels::measure_read_bandwidth(0);
  return measured;
}

void block_product(benchmark::State& state, GgmlType type) {
  const std::int64_t row_bytes = tessera::bytes_of(type, kInputs);
  std::vector<std::byte> blocks(static_cast<std::size_t>(kOutputs * row_bytes));
  std::mt19937_64 random(1);
  for (std::byte& byte : blocks) byte = static_cast<std::byte>(random() & 0x3f);  // scales stay finite
  std::vector<float> x(kInputs, 0.5F);
  std::vector<float> y(kOutputs);
  const tessera::kernels::BlockRows weights{type, blocks.data(), row_bytes, kOutputs, kInputs};
  for (auto _ : state) {
    tessera::kernels::multiply_blocks(weights, x.data(), 1, y.data(), 0, tessera::default_isa());
    benchmark::DoNotOptimize(y.data());
  }
  const double bytes = static_cast<double>(blocks.size()) * static_cast<double>(state.iterations());
  state.counters["GB/s"] = benchmark::Counter(bytes / 1e9, benchmark::Counter::kIsRate);
  state.counters["of bandwidth"] = benchmark::Counter(bytes / 1e9 / bandwidth(), benchmark::Counter::kIsRate);
}

BENCHMARK_CAPTURE(block_product, q8_0, GgmlType::q8_0)->UseRealTime()->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(block_product, q4_0, GgmlType::q4_0)->UseRealTime()->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(block_product, q5_1, GgmlType::q5_1)->UseRealTime()->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(block_product, q2_k, GgmlType::q2_k)->UseRealTime()->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(block_product, q3_k, GgmlType::q3_k)->UseRealTime()->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(block_product, q4_k, GgmlType::q4_k)->UseRealTime()->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(block_product, q5_k, GgmlType::q5_k)->UseRealTime()->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(block_product, q6_k, GgmlType::q6_k)->UseRealTime()->Unit(benchmark::kMillisecond);

}  // namespace
