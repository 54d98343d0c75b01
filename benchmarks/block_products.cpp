// Decoding from weights in ggml blocks: one row of activations times a matrix. `memory`: far larger than the caches,
// GB/s of weights read and the share of what memory gives to passes taken in turn with the products; `cache`: the same
// product out of the second-level caches, which is what the arithmetic allows.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <random>
#include <vector>

#include "io/ggml_blocks.h"
#include "kernels/block_product.h"
#include "kernels/peak.h"

namespace {

using tessera::GgmlType;

constexpr std::int64_t kInputs = 2048;
constexpr std::int64_t kOutputs = 65536;
constexpr std::int64_t kCachedOutputs = 512;

struct Product {
  Product(GgmlType type, std::int64_t outputs)
      : blocks(static_cast<std::size_t>(outputs * tessera::bytes_of(type, kInputs))),
        x(kInputs, 0.5F),
        y(static_cast<std::size_t>(outputs)),
        weights{type, blocks.data(), tessera::bytes_of(type, kInputs), outputs, kInputs} {
    std::mt19937_64 random(1);
    for (std::byte& byte : blocks) byte = static_cast<std::byte>(random() & 0x3f);  // scales stay finite
  }
  double seconds() {
    const auto start = std::chrono::steady_clock::now();
    tessera::kernels::multiply_blocks(weights, x.data(), 1, y.data(), 0, tessera::default_isa());
    benchmark::DoNotOptimize(y.data());
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  double gigabytes() const { return static_cast<double>(blocks.size()) / 1e9; }

  std::vector<std::byte> blocks;
  std::vector<float> x;
  std::vector<float> y;
  tessera::kernels::BlockRows weights;
};

double median(std::vector<double> numbers) {
  std::sort(numbers.begin(), numbers.end());
  return numbers[numbers.size() / 2];
}

void memory(benchmark::State& state, GgmlType type) {
  static tessera::kernels::MemoryReader reader(0);
  Product product(type, kOutputs);
  std::vector<double> fractions;
  std::vector<double> speeds;
  std::vector<double> peaks;
  for (auto _ : state) {
    const double before = reader.pass();
    const double seconds = product.seconds();
    state.SetIterationTime(seconds);
    speeds.push_back(product.gigabytes() / seconds);
    peaks.push_back((before + reader.pass()) / 2);
    fractions.push_back(speeds.back() / peaks.back());
  }
  state.counters["GB/s"] = median(speeds);
  state.counters["peak"] = median(peaks);
  state.counters["of bandwidth"] = median(fractions);
}

void cache(benchmark::State& state, GgmlType type) {
  Product product(type, kCachedOutputs);
  std::vector<double> speeds;
  for (auto _ : state) {
    const double seconds = product.seconds();
    state.SetIterationTime(seconds);
    speeds.push_back(product.gigabytes() / seconds);
  }
  state.counters["GB/s"] = median(speeds);
}

#define TESSERA_PRODUCT(type)                                                                                      \
  BENCHMARK_CAPTURE(memory, type, GgmlType::type)->UseManualTime()->Iterations(15)->Unit(benchmark::kMillisecond); \
  BENCHMARK_CAPTURE(cache, type, GgmlType::type)->UseManualTime()->MinTime(0.1)->Unit(benchmark::kMicrosecond)

TESSERA_PRODUCT(q8_0);
TESSERA_PRODUCT(q4_0);
TESSERA_PRODUCT(q5_0);
TESSERA_PRODUCT(q5_1);
TESSERA_PRODUCT(q2_k);
TESSERA_PRODUCT(q3_k);
TESSERA_PRODUCT(q4_k);
TESSERA_PRODUCT(q5_k);
TESSERA_PRODUCT(q6_k);

}  // namespace
