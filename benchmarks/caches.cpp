// Decoding from caches that compress, evict or select, beside the dense one: one layer of 32/8 heads of 128, 32,768
// tokens of generated heads (heads-llm) in bf16. A step of each in turn; the counters are medians, the bytes held after
// the prompt, and the relative L2 error of the outputs against those of the dense cache.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <ctime>
#include <memory>
#include <string>
#include <vector>

#include "tessera/eval.h"
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

/// The tokens of every sequence.
const tessera::HeadData& tokens() {
  static const tessera::HeadData data = [] {
    tessera::HeadOptions options;
    options.tokens = kTokens + kSteps;
    options.q_heads = kShape.q_heads;
    options.kv_heads = kShape.kv_heads;
    options.head_dim = kShape.head_dim;
    options.dtype = kShape.dtype;
    return tessera::make_heads(options);
  }();
  return data;
}

/// Rows [first, first + count) of a tensor [1, heads, tokens, dim] as [count][heads * dim].
std::vector<float> rows_of(const tessera::TensorView& tensor, std::int64_t first, std::int64_t count) {
  std::vector<float> rows;
  rows.reserve(static_cast<std::size_t>(count * tensor.heads() * tensor.dim()));
  for (std::int64_t n = first; n < first + count; ++n) {
    for (std::int64_t h = 0; h < tensor.heads(); ++h) {
      for (std::int64_t d = 0; d < tensor.dim(); ++d) {
        rows.push_back(tessera::load_as_float(tensor.row(0, h, n), tensor.dtype, d));
      }
    }
  }
  return rows;
}

/// A cache and its method; every sequence sees the same tokens.
class Sequence {
 public:
  explicit Sequence(const std::string& spec)
      : method_(tessera::make_method(spec)), state_(method_->new_state()), cache_(method_->new_cache(kShape, {})) {
    if (cache_ == nullptr) cache_ = tessera::make_paged_cache(kShape);
    // What the prompt's attention costs is another question: the method of the prompt is a cheap one.
    const auto prefill = tessera::make_method("streaming:n_init=4,n_local=64");
    for (std::int64_t token = 0; token < kTokens; token += kChunk) pass(*prefill, kChunk, true);
    cache_->finish_prefill({});
  }

  /// Time of the attention of one more token.
  Time step() { return pass(*method_, 1, false); }
  std::size_t bytes() const { return cache_->memory_bytes() + (state_ ? state_->memory_bytes() : 0); }
  /// Output of the last step: [q_heads * value_dim].
  const std::vector<float>& output() const { return output_; }

 private:
  Time pass(const Method& method, std::int64_t rows, bool prompt) {
    const std::int64_t first = cache_->tokens();
    const auto k = rows_of(tokens().k(), first, rows);
    const auto v = rows_of(tokens().v(), first, rows);
    output_.resize(static_cast<std::size_t>(rows * kShape.q_heads * kShape.value_dim));
    cache_->append(rows, k.data(), v.data(), 0);
    tessera::CacheCall call;
    call.method = &method;
    call.prompt = prompt;
    call.q = tokens().q();
    call.q.data = call.q.row(0, 0, first);
    call.q.shape[2] = rows;
    call.outputs = {tessera::mutable_view_of(output_.data(), DType::f32, {1, kShape.q_heads, rows, kShape.value_dim},
                                             tessera::Layout::bnhd),
                    {}};
    tessera::PlanContext context;
    context.state = prompt ? nullptr : state_.get();
    const auto start = std::chrono::steady_clock::now();
    const std::clock_t ticks = std::clock();
    cache_->attend(call, context);
    const double processor = 1000.0 * static_cast<double>(std::clock() - ticks) / CLOCKS_PER_SEC;
    return {std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count(), processor};
  }

  std::unique_ptr<const Method> method_;
  std::unique_ptr<tessera::MethodState> state_;
  std::unique_ptr<LayerCache> cache_;
  std::vector<float> output_;
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
  double difference = 0;
  double size = 0;
  for (auto _ : state) {
    dense_times.push_back(dense.step());
    own_times.push_back(compressed.step());
    for (std::size_t i = 0; i < dense.output().size(); ++i) {
      difference += std::pow(compressed.output()[i] - dense.output()[i], 2);
      size += std::pow(dense.output()[i], 2);
    }
    state.SetIterationTime(own_times.back().wall / 1000);
  }
  state.counters["rel_l2"] = std::sqrt(difference / size);
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
                           "zipcache:unimportant=1,recent_probes=0.001,random_probes=0.001", "mustafar", "think",
                           "quest:dense_layers=0,budget=2048", "snapkv:capacity=2048"}) {
    add(spec);
  }
  return true;
}();

}  // namespace
