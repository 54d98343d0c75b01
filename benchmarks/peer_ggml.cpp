// Tessera against ggml's flash attention on the CPU: the same values, one process, in turn; medians.
//
// ggml keeps keys and values in f16, queries and output in f32; Tessera gets all in f16. Both skip what the causal mask
// hides. Usage: peer_ggml [--repeats R] [--threads T]
#include <fmt/format.h>
#include <ggml-cpu.h>
#include <ggml.h>
#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "eval/random.h"
#include "tessera/tessera.h"

namespace {

using tessera::DType;

struct Case {
  std::string name;
  std::int64_t q_heads;
  std::int64_t kv_heads;
  std::int64_t queries;
  std::int64_t keys;
  std::int64_t dim;
  bool causal;
};

std::vector<std::uint16_t> random_f16(std::int64_t elements, std::uint64_t seed) {
  std::vector<float> values(static_cast<std::size_t>(elements));
  tessera::eval::Random(seed, {0}).add_normal(values, 1);
  std::vector<std::uint16_t> halves(values.size());
  std::transform(values.begin(), values.end(), halves.begin(), &tessera::float_to_f16);
  return halves;
}

/// q, k, v in [heads, tokens, dim].
struct Data {
  std::vector<std::uint16_t> q;
  std::vector<std::uint16_t> k;
  std::vector<std::uint16_t> v;
};

class GgmlAttention {
 public:
  GgmlAttention(const Case& c, const Data& data, int threads) : case_(c) {
    const std::int64_t masked_rows = c.causal ? (c.queries + 63) / 64 * 64 : 0;
    const std::size_t bytes = 4 * data.q.size() + 2 * (data.k.size() + data.v.size()) + 4 * data.q.size() +
                              static_cast<std::size_t>(2 * masked_rows * c.keys) + (std::size_t{1} << 20);
    context_.reset(ggml_init({bytes, nullptr, false}));
    ggml_tensor* q = ggml_new_tensor_4d(context_.get(), GGML_TYPE_F32, c.dim, c.queries, c.q_heads, 1);
    ggml_tensor* k = ggml_new_tensor_4d(context_.get(), GGML_TYPE_F16, c.dim, c.keys, c.kv_heads, 1);
    ggml_tensor* v = ggml_new_tensor_4d(context_.get(), GGML_TYPE_F16, c.dim, c.keys, c.kv_heads, 1);
    std::transform(data.q.begin(), data.q.end(), static_cast<float*>(q->data), &tessera::f16_to_float);
    std::memcpy(k->data, data.k.data(), ggml_nbytes(k));
    std::memcpy(v->data, data.v.data(), ggml_nbytes(v));
    output_ = ggml_flash_attn_ext(context_.get(), q, k, v, c.causal ? causal_mask(masked_rows) : nullptr,
                                  1 / std::sqrt(static_cast<float>(c.dim)), 0, 0);
    graph_ = ggml_new_graph(context_.get());
    ggml_build_forward_expand(graph_, output_);
    plan_ = ggml_graph_plan(graph_, threads, nullptr);
    work_.resize(plan_.work_size);
    plan_.work_data = work_.data();
  }

  void run() { ggml_graph_compute(graph_, &plan_); }
  /// Output is [queries, heads, dim].
  float at(std::int64_t head, std::int64_t query, std::int64_t i) const {
    return static_cast<const float*>(output_->data)[(query * case_.q_heads + head) * case_.dim + i];
  }

 private:
  ggml_tensor* causal_mask(std::int64_t rows) {
    ggml_tensor* mask = ggml_new_tensor_2d(context_.get(), GGML_TYPE_F16, case_.keys, rows);
    auto* bits = static_cast<std::uint16_t*>(mask->data);
    const std::uint16_t hidden = tessera::float_to_f16(-std::numeric_limits<float>::infinity());
    for (std::int64_t i = 0; i < rows; ++i) {
      const std::int64_t seen = std::min(case_.keys, case_.keys - case_.queries + i + 1);
      std::fill_n(bits + i * case_.keys, seen, std::uint16_t{0});
      std::fill_n(bits + i * case_.keys + seen, case_.keys - seen, hidden);
    }
    return mask;
  }

  struct Free {
    void operator()(ggml_context* context) const { ggml_free(context); }
  };
  Case case_;
  std::unique_ptr<ggml_context, Free> context_;
  ggml_tensor* output_ = nullptr;
  ggml_cgraph* graph_ = nullptr;
  ggml_cplan plan_{};
  std::vector<std::uint8_t> work_;
};

class TesseraAttention {
 public:
  TesseraAttention(const Case& c, const Data& data, int threads)
      : case_(c), output_(data.q.size()), method_(tessera::make_method("dense")) {
    inputs_.q = tessera::view_of(data.q.data(), DType::f16, {1, c.q_heads, c.queries, c.dim});
    inputs_.k = tessera::view_of(data.k.data(), DType::f16, {1, c.kv_heads, c.keys, c.dim});
    inputs_.v = tessera::view_of(data.v.data(), DType::f16, {1, c.kv_heads, c.keys, c.dim});
    problem_ = tessera::problem_of(inputs_.q, inputs_.k, inputs_.v, c.causal);
    context_.run.threads = threads;
  }

  void run() {
    const auto o = tessera::mutable_view_of(output_.data(), DType::f32, {1, case_.q_heads, case_.queries, case_.dim});
    method_->attend(problem_, inputs_, {o, {}}, context_);
  }
  float at(std::int64_t head, std::int64_t query, std::int64_t i) const {
    return output_[static_cast<std::size_t>((head * case_.queries + query) * case_.dim + i)];
  }

 private:
  Case case_;
  std::vector<float> output_;
  std::unique_ptr<const tessera::Method> method_;
  tessera::AttentionInputs inputs_;
  tessera::Problem problem_;
  tessera::PlanContext context_;
};

double milliseconds(const std::function<void()>& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
}

double median(std::vector<double> samples) {
  std::nth_element(samples.begin(), samples.begin() + static_cast<std::ptrdiff_t>(samples.size() / 2), samples.end());
  return samples[samples.size() / 2];
}

double relative_difference(const Case& c, const TesseraAttention& ours, const GgmlAttention& theirs) {
  double difference = 0;
  double size = 0;
  for (std::int64_t head = 0; head < c.q_heads; ++head) {
    for (std::int64_t query = 0; query < c.queries; query += std::max<std::int64_t>(1, c.queries / 97)) {
      for (std::int64_t i = 0; i < c.dim; ++i) {
        const double d = ours.at(head, query, i) - theirs.at(head, query, i);
        difference += d * d;
        size += static_cast<double>(theirs.at(head, query, i)) * theirs.at(head, query, i);
      }
    }
  }
  return std::sqrt(difference / size);
}

void compare(const Case& c, int threads, int repeats) {
  const Data data{random_f16(c.q_heads * c.queries * c.dim, 1), random_f16(c.kv_heads * c.keys * c.dim, 2),
                  random_f16(c.kv_heads * c.keys * c.dim, 3)};
  GgmlAttention theirs(c, data, threads);
  TesseraAttention ours(c, data, threads);
  theirs.run();
  ours.run();
  const double difference = relative_difference(c, ours, theirs);
  std::vector<double> ours_ms(static_cast<std::size_t>(repeats));
  std::vector<double> theirs_ms(ours_ms.size());
  for (std::size_t i = 0; i < ours_ms.size(); ++i) {
    ours_ms[i] = milliseconds([&] { ours.run(); });
    theirs_ms[i] = milliseconds([&] { theirs.run(); });
  }
  const double ours_median = median(ours_ms);
  const double theirs_median = median(theirs_ms);
  fmt::print("{:<44}{:>12.2f} ms{:>12.2f} ms{:>9.2f}x   relative difference {:.2g}\n", c.name, ours_median,
             theirs_median, theirs_median / ours_median, difference);
  // With few queries ggml sums the values in f16: over 128k random ones that alone costs several percent.
  if (!(difference < (c.queries < 16 ? 1e-1 : 1e-2))) throw std::runtime_error("the two libraries disagree: " + c.name);
}

}  // namespace

int main(int argc, char** argv) {
  int threads = omp_get_max_threads();
  int repeats = 5;
  for (int i = 1; i + 1 < argc; i += 2) {
    if (std::strcmp(argv[i], "--threads") == 0) threads = std::atoi(argv[i + 1]);
    if (std::strcmp(argv[i], "--repeats") == 0) repeats = std::max(1, std::atoi(argv[i + 1]));
  }
  try {
    ggml_cpu_init();
    fmt::print("f16 keys and values, {} threads, medians of {}\n{:<44}{:>15}{:>15}{:>10}\n", threads, repeats, "",
               "tessera", "ggml", "speed-up");
    for (const Case& c : {Case{"dense causal 8/2 heads, 8192, dim 128", 8, 2, 8192, 8192, 128, true},
                          Case{"dense causal 8/2 heads, 8192, dim 64", 8, 2, 8192, 8192, 64, true},
                          Case{"decode 32/8 heads, 1 query, 131072 keys, dim 128", 32, 8, 1, 131072, 128, false}}) {
      compare(c, threads, repeats);
    }
  } catch (const std::exception& error) {
    fmt::print(stderr, "peer_ggml: {}\n", error.what());
    return 2;
  }
  return 0;
}
