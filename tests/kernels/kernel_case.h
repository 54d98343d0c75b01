// Random attention calls for the kernel tests: tensors in every dtype, layout and length, guarded outputs, and the
// float64 result with a bound on the error that follows from dtypes and magnitudes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "kernels/cpu/cpu.h"
#include "kernels/emulated_levels.h"
#include "kernels/kernels.h"
#include "plan/random_plans.h"
#include "tessera/attention.h"

namespace tessera::testing {

/// A tensor with its memory. Rows may be padded apart (strides), and the buffer ends right after the last row.
struct OwnedTensor {
  std::vector<std::byte> memory;
  MutableTensorView view;

  OwnedTensor() = default;
  OwnedTensor(DType dtype, std::array<std::int64_t, 4> shape, Layout layout, std::int64_t row_padding) {
    auto padded = shape;
    padded[3] += row_padding;
    const std::int64_t elements = padded[0] * padded[1] * padded[2] * padded[3];
    memory.resize(static_cast<std::size_t>(std::max<std::int64_t>(elements, 1)) * size_of(dtype));
    view = mutable_view_of(memory.data(), dtype, padded, layout);
    view.shape = shape;
  }
  void fill(Random& random, float amplitude) {
    std::normal_distribution<float> normal(0.0F, amplitude);
    for (std::int64_t b = 0; b < view.shape[0]; ++b) {
      for (std::int64_t h = 0; h < view.shape[1]; ++h) {
        for (std::int64_t n = 0; n < view.shape[2]; ++n) {
          for (std::int64_t d = 0; d < view.shape[3]; ++d) {
            store_from_float(view.row(b, h, n), view.dtype, d, normal(random));
          }
        }
      }
    }
  }
};

struct CaseOptions {
  DType dtype = DType::f32;
  DType output = DType::f32;
  std::int64_t head_dim = 64;
  std::int64_t value_dim = 64;
  Layout layout = Layout::bhnd;
  std::int64_t row_padding = 0;
  std::int64_t page_size = 0;  ///< 0: not paged
  bool modifiers = false;
  bool sources = false;
};

inline constexpr DType kAllDtypes[] = {DType::f32, DType::bf16, DType::f16};
inline constexpr std::int64_t kAllDims[] = {16, 24, 33, 64, 65, 80, 128, 256, 7};

template <class Values>
auto pick(Random& random, const Values& values) {
  return values[uniform(random, 0, static_cast<std::int64_t>(std::size(values)) - 1)];
}

/// Dtypes, dims, layout and padding at random.
inline CaseOptions random_options(Random& random) {
  CaseOptions options;
  options.dtype = pick(random, kAllDtypes);
  options.output = pick(random, kAllDtypes);
  options.head_dim = pick(random, kAllDims);
  options.value_dim = chance(random, 50) ? options.head_dim : pick(random, kAllDims);
  options.layout = chance(random, 50) ? Layout::bhnd : Layout::bnhd;
  options.row_padding = chance(random, 30) ? 8 : 0;
  return options;
}

/// One call with its plan; tensors fit the plan's problem.
class KernelCase {
 public:
  KernelCase(Random& random, Plan given, const CaseOptions& options) : plan(std::move(given)), options_(options) {
    plan.problem.head_dim = options.head_dim;
    plan.problem.value_dim = options.value_dim;
    const Problem& p = plan.problem;
    const std::int64_t batch = p.variable_length() ? 1 : p.batch;
    q = OwnedTensor(options.dtype, {batch, p.q_heads, p.q_len, p.head_dim}, options.layout, options.row_padding);
    if (options.page_size > 0) {
      make_pages(random);
    } else {
      k = OwnedTensor(options.dtype, {batch, p.kv_heads, p.kv_len, p.head_dim}, options.layout, options.row_padding);
      v = OwnedTensor(options.dtype, {batch, p.kv_heads, p.kv_len, p.value_dim}, options.layout, options.row_padding);
    }
    q.fill(random, 2.0F);
    k.fill(random, 1.0F);
    v.fill(random, 1.0F);
    inputs.q = q.view;
    inputs.k = k.view;
    inputs.v = v.view;
    if (options.modifiers) add_modifiers(random);
    if (options.sources) add_sources(random);
  }

  /// Output and LSE of one run, with guard bytes that must survive.
  struct Result {
    std::vector<float> o;
    std::vector<float> lse;
    std::vector<std::byte> raw;
    bool guards_intact = true;
  };

  template <class Run>
  Result evaluate(DType dtype, const Run& run_it) const {
    const Problem& p = plan.problem;
    const std::int64_t batch = p.variable_length() ? 1 : p.batch;
    constexpr std::int64_t guard = 24;
    OwnedTensor o(dtype, {batch, p.q_heads, p.q_len, p.value_dim}, options_.layout, guard);
    std::fill(o.memory.begin(), o.memory.end(), std::byte{0x5a});
    Result result;
    result.lse.assign(static_cast<std::size_t>(batch * p.q_heads * p.q_len), 12345.0F);
    run_it(AttentionOutputs{o.view, result.lse});
    for (std::int64_t b = 0; b < batch; ++b) {
      for (std::int64_t h = 0; h < p.q_heads; ++h) {
        for (std::int64_t n = 0; n < p.q_len; ++n) {
          const std::byte* row = o.view.row(b, h, n);
          for (std::int64_t d = 0; d < p.value_dim; ++d) result.o.push_back(load_as_float(row, dtype, d));
          const auto end = static_cast<std::size_t>(p.value_dim) * size_of(dtype);
          for (std::size_t i = 0; i < guard * size_of(dtype); ++i) {
            result.guards_intact = result.guards_intact && row[end + i] == std::byte{0x5a};
          }
        }
      }
    }
    result.raw = o.memory;
    return result;
  }

  Result reference() const {
    return evaluate(DType::f32, [&](const AttentionOutputs& outputs) {
      RunOptions run_options;
      run_options.kernel = KernelKind::reference;
      run(plan, inputs, outputs, run_options);
    });
  }

  Result with(KernelKind kind, const kernels::LevelKernels& level, int threads = 2,
              std::size_t workspace = std::size_t{48} << 20) const {
    return evaluate(options_.output, [&](const AttentionOutputs& outputs) {
      const kernels::Call call{plan, inputs, outputs, threads, workspace};
      kernels::clear_uncovered_rows(call);
      if (kind == KernelKind::query_major) kernels::run_query_major(call, level);
      if (kind == KernelKind::key_major) kernels::run_key_major(call, level);
      if (kind == KernelKind::split_key) kernels::run_split_key(call, level);
    });
  }

  /// Bound on |o - reference|: scores are off by at most (D + 8) eps times the largest |q||k|, which moves weights by
  /// twice that; probabilities rounded to bf16 move by 2^-8; an output of dtype T rounds by eps(T).
  float tolerance(bool pairs) const {
    const float eps = std::numeric_limits<float>::epsilon();
    const float scale = std::fabs(plan.problem.softmax_scale());
    const float score = largest_norm(q) * largest_norm(k) * scale + largest_extra_;
    const float score_error = (static_cast<float>(plan.problem.head_dim) + 8) * eps * score;
    const float probability_error = pairs ? 1.0F / 256 : 8 * eps;
    const float output_error = options_.output == DType::bf16  ? 1.0F / 256
                               : options_.output == DType::f16 ? 1.0F / 2048
                                                               : eps;
    return largest_value() * (2 * score_error + probability_error + output_error) + 1e-6F;
  }
  float lse_tolerance() const {
    return (static_cast<float>(plan.problem.head_dim) + 16) * std::numeric_limits<float>::epsilon() *
               (largest_norm(q) * largest_norm(k) * std::fabs(plan.problem.softmax_scale()) + largest_extra_ + 10) +
           1e-5F;
  }

  Plan plan;
  OwnedTensor q;
  OwnedTensor k;
  OwnedTensor v;
  AttentionInputs inputs;

 private:
  static float largest_norm(const OwnedTensor& tensor) {
    float largest = 0;
    for_each_row(tensor, [&](const std::byte* row) {
      float sum = 0;
      for (std::int64_t d = 0; d < tensor.view.shape[3]; ++d) {
        const float x = load_as_float(row, tensor.view.dtype, d);
        sum += x * x;
      }
      if (std::isfinite(sum)) largest = std::max(largest, std::sqrt(sum));
    });
    return largest;
  }
  float largest_value() const {
    float largest = 0;
    for_each_row(v, [&](const std::byte* row) {
      for (std::int64_t d = 0; d < v.view.shape[3]; ++d) {
        const float x = std::fabs(load_as_float(row, v.view.dtype, d));
        if (std::isfinite(x)) largest = std::max(largest, x);
      }
    });
    return largest;
  }
  template <class Body>
  static void for_each_row(const OwnedTensor& tensor, const Body& body) {
    for (std::int64_t b = 0; b < tensor.view.shape[0]; ++b) {
      for (std::int64_t h = 0; h < tensor.view.shape[1]; ++h) {
        for (std::int64_t n = 0; n < tensor.view.shape[2]; ++n) body(tensor.view.row(b, h, n));
      }
    }
  }

  /// Pages of all sequences in a shuffled pool, with a few spare ones.
  void make_pages(Random& random) {
    const Problem& p = plan.problem;
    const std::int64_t per_sequence = (p.kv_len + options_.page_size - 1) / options_.page_size;
    const std::int64_t pool = per_sequence * p.batch + 3;
    std::vector<std::int32_t> numbers(static_cast<std::size_t>(pool));
    std::iota(numbers.begin(), numbers.end(), 0);
    std::shuffle(numbers.begin(), numbers.end(), random);
    numbers.resize(static_cast<std::size_t>(per_sequence * p.batch));
    page_numbers_ = std::move(numbers);
    k = OwnedTensor(options_.dtype, {pool, p.kv_heads, options_.page_size, p.head_dim}, Layout::bhnd, 0);
    v = OwnedTensor(options_.dtype, {pool, p.kv_heads, options_.page_size, p.value_dim}, Layout::bhnd, 0);
    inputs.pages = {page_numbers_, per_sequence, options_.page_size};
  }

  void add_modifiers(Random& random) {
    const Problem& p = plan.problem;
    Modifiers& m = inputs.modifiers;
    const auto heads = static_cast<std::size_t>(p.q_heads);
    std::uniform_real_distribution<float> uniform_real(-1.0F, 1.0F);
    if (chance(random, 60)) m.softcap = 3.0F;
    if (chance(random, 60)) {
      for (std::size_t h = 0; h < heads; ++h) slopes_.push_back(0.03F * uniform_real(random));
      m.alibi_slopes = slopes_;
      largest_extra_ += 0.03F * 400;
    }
    if (chance(random, 60)) {
      for (std::size_t h = 0; h < heads; ++h) sinks_.push_back(3 * uniform_real(random));
      m.sink_logits = sinks_;
    }
    if (chance(random, 60)) {
      const std::int64_t batch = p.variable_length() ? 1 : p.batch;
      const std::int64_t choices[] = {1, p.kv_heads, p.q_heads};
      const std::int64_t bias_heads = choices[uniform(random, 0, 2)];
      bias_ = OwnedTensor(DType::f32, {chance(random, 50) ? 1 : batch, bias_heads, p.kv_len, 1}, Layout::bhnd, 0);
      bias_.fill(random, 1.0F);
      m.key_bias = bias_.view;
      largest_extra_ += 5;
    }
  }

  void add_sources(Random& random) {
    const Problem& p = plan.problem;
    for (std::size_t i = 1; i < plan.sources.size(); ++i) {
      const std::int64_t keys = plan.sources[i].keys;
      source_tensors_.push_back(std::make_unique<OwnedTensor>(
          options_.dtype, std::array<std::int64_t, 4>{p.batch, p.kv_heads, keys, p.head_dim}, Layout::bhnd, 0));
      source_tensors_.back()->fill(random, 1.0F);
      KeySource source;
      source.k = source_tensors_.back()->view;
      source_tensors_.push_back(std::make_unique<OwnedTensor>(
          options_.dtype, std::array<std::int64_t, 4>{p.batch, p.kv_heads, keys, p.value_dim}, Layout::bhnd, 0));
      source_tensors_.back()->fill(random, 1.0F);
      source.v = source_tensors_.back()->view;
      auto weights = std::make_unique<std::vector<float>>();
      std::normal_distribution<float> normal;
      for (std::int64_t j = 0; j < p.batch * p.kv_heads * keys; ++j) weights->push_back(normal(random));
      if (chance(random, 70)) source.log_weight = *weights;
      log_weights_.push_back(std::move(weights));
      inputs.sources.push_back(source);
    }
    largest_extra_ += 5;
  }

  CaseOptions options_;
  std::vector<std::int32_t> page_numbers_;
  std::vector<float> slopes_;
  std::vector<float> sinks_;
  OwnedTensor bias_;
  std::vector<std::unique_ptr<OwnedTensor>> source_tensors_;
  std::vector<std::unique_ptr<std::vector<float>>> log_weights_;
  float largest_extra_ = 0;
};

/// An instruction set under test: native, or emulated where the machine lacks it.
struct TestedLevel {
  std::string name;
  const kernels::LevelKernels* kernels;
};

inline std::vector<TestedLevel> tested_levels() {
  std::vector<TestedLevel> levels;
  for (const Isa isa : supported_isas()) levels.push_back({std::string(name_of(isa)), &kernels::level_of(isa)});
  if (supported_isas().size() == 1) return levels;  // the emulation is built for AVX2
#ifndef TESSERA_NO_EMULATED_LEVELS
  levels.push_back({"avx512 emulated", &kernels::emulated_avx512()});
  levels.push_back({"avx512_bf16 emulated", &kernels::emulated_avx512_bf16()});
#endif
  return levels;
}

}  // namespace tessera::testing
