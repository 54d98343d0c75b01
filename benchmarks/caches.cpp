// Decoding from compressed caches beside the dense one: one layer of 32/8 heads of 128, 32,768 tokens of bf16. A step
// of each in turn; the counters are medians, and bytes held after the prompt.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <ctime>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "tessera/method.h"

namespace {

using tessera::DType;
using tessera::LayerCache;
using tessera::LayerCacheShape;
using tessera::Method;

constexpr std::int64_t kTokens = 32768;
constexpr std::int64_t kChunk = 2048;
constexpr std::int64_t kSteps = 64;  // below the number that would be compressed meanwhile
constexpr LayerCacheShape kShape{.q_heads = 32,
                                 .kv_heads = 8,
                                 .head_dim = 128,
                                 .value_dim = 128,
                                 .dtype = DType::bf16,
                                 .capacity = kTokens + kSteps};

/// Milliseconds: by the clock, and of this program's processors.
struct Time {
  double wall;
  double processor;
};

/// A cache, its method, and its random tokens: the same for every cache.
class Sequence {
 public:
  explicit Sequence(const std::string& spec)
      : method_(tessera::make_method(spec)), cache_(method_->new_cache(kShape, {})) {
    if (cache_ == nullptr) cache_ = tessera::make_paged_cache(kShape);
    // What the prompt's attention costs is another question: the method of the prompt is a cheap one.
    const auto prefill = tessera::make_method("streaming:n_init=4,n_local=64");
    for (std::int64_t token = 0; token < kTokens; token += kChunk) pass(*prefill, kChunk, true);
    cache_->finish_prefill({});
  }

  /// Time of the attention of one more token.
  Time step() { return pass(*method_, 1, false); }
  std::size_t bytes() const { return cache_->memory_bytes(); }

 private:
  std::vector<float> numbers(std::int64_t count) {
    std::normal_distribution<float> normal;
    std::vector<float> out(static_cast<std::size_t>(count));
    for (float& x : out) x = normal(random_);
    return out;
  }

  Time pass(const Method& method, std::int64_t rows, bool prompt) {
    const auto k = numbers(rows * kShape.kv_heads * kShape.head_dim);
    const auto v = numbers(rows * kShape.kv_heads * kShape.value_dim);
    const auto q = numbers(rows * kShape.q_heads * kShape.head_dim);
    std::vector<float> o(static_cast<std::size_t>(rows * kShape.q_heads * kShape.value_dim));
    std::vector<std::byte> q_stored(q.size() * 2);
    for (std::size_t i = 0; i < q.size(); ++i) {
      tessera::store_from_float(q_stored.data(), DType::bf16, static_cast<std::int64_t>(i), q[i]);
    }
    cache_->append(rows, k.data(), v.data(), 0);
    tessera::CacheCall call;
    call.method = &method;
    call.prompt = prompt;
    call.q = tessera::view_of(q_stored.data(), DType::bf16, {1, kShape.q_heads, rows, kShape.head_dim},
                              tessera::Layout::bnhd);
    call.outputs = {tessera::mutable_view_of(o.data(), DType::f32, {1, kShape.q_heads, rows, kShape.value_dim},
                                             tessera::Layout::bnhd),
                    {}};
    const auto start = std::chrono::steady_clock::now();
    const std::clock_t ticks = std::clock();
    cache_->attend(call, {});
    const double processor = 1000.0 * static_cast<double>(std::clock() - ticks) / CLOCKS_PER_SEC;
    return {std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count(), processor};
  }

  std::unique_ptr<const Method> method_;
  std::unique_ptr<LayerCache> cache_;
  std::mt19937 random_{1};
};

double median(std::vector<Time> times, double Time::*kind) {
  const auto middle = times.begin() + static_cast<std::ptrdiff_t>(times.size() / 2);
  std::nth_element(times.begin(), middle, times.end(), [&](const Time& a, const Time& b) { return a.*kind < b.*kind; });
  return (*middle).*kind;
}

void decode(benchmark::State& state, const std::string& spec) {
  Sequence dense("dense");
  Sequence compressed(spec);
  state.counters["bytes/dense"] = static_cast<double>(compressed.bytes()) / static_cast<double>(dense.bytes());
  std::vector<Time> dense_times;
  std::vector<Time> own_times;
  for (auto _ : state) {
    dense_times.push_back(dense.step());
    own_times.push_back(compressed.step());
    state.SetIterationTime(own_times.back().wall / 1000);
  }
  state.counters["ms"] = median(own_times, &Time::wall);
  state.counters["dense_ms"] = median(dense_times, &Time::wall);
  state.counters["time/dense"] = median(own_times, &Time::wall) / median(dense_times, &Time::wall);
  state.counters["processor/dense"] = median(own_times, &Time::processor) / median(dense_times, &Time::processor);
}

void add(const char* spec) {
  benchmark::RegisterBenchmark(spec, [spec](benchmark::State& state) { decode(state, spec); })
      ->Iterations(kSteps)
      ->UseManualTime()
      ->Unit(benchmark::kMillisecond);
}

// Few probes: they judge the prompt, and decoding does not see them.
const bool kRegistered = [] {
  for (const char* spec : {"zipcache:recent_probes=0.001,random_probes=0.001",
                           "zipcache:unimportant=0,recent_probes=0.001,random_probes=0.001",
                           "zipcache:unimportant=1,recent_probes=0.001,random_probes=0.001", "mustafar", "think"}) {
    add(spec);
  }
  return true;
}();

}  // namespace
