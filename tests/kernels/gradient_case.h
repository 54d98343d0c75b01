// Random backward calls for the kernel tests: gradients in every dtype and layout, and per element the sum of the
// absolute terms it is made of, which is what rounding errors are proportional to.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "kernels/backward.h"
#include "kernels/kernel_case.h"
#include "kernels/reference/row.h"

namespace tessera::testing {

/// All gradients of a call, named, as numbers in the order of their axes.
struct GradientValues {
  struct Tensor {
    std::string name;
    std::vector<double> values;
  };
  std::vector<Tensor> tensors;
  bool guards_intact = true;
};

class GradientCase {
 public:
  GradientCase(Random& random, const KernelCase& forward, DType d_o_type, bool with_d_lse) : forward_(forward) {
    const Problem& p = forward.plan.problem;
    batch_ = p.variable_length() ? 1 : p.batch;
    o_ = OwnedTensor(DType::f32, {batch_, p.q_heads, p.q_len, p.value_dim}, Layout::bhnd, 0);
    lse_.resize(static_cast<std::size_t>(batch_ * p.q_heads * p.q_len));
    RunOptions options;
    options.kernel = KernelKind::reference;
    run(forward.plan, forward.inputs, {o_.view, lse_}, options);
    d_o_ = OwnedTensor(d_o_type, o_.view.shape, chance(random, 50) ? Layout::bhnd : Layout::bnhd,
                       chance(random, 30) ? 8 : 0);
    d_o_.fill(random, 1.0F);
    if (with_d_lse) {
      std::normal_distribution<float> normal;
      for (std::size_t i = 0; i < lse_.size(); ++i) d_lse_.push_back(normal(random));
    }
    saved.o = o_.view;
    saved.lse = lse_;
    saved.d_o = d_o_.view;
    saved.d_lse = d_lse_;
  }

  OwnedTensor& d_o() { return d_o_; }

  /// Runs a backward pass into guarded memory: run_it(call).
  template <class Run>
  GradientValues evaluate(DType dtype, int threads, const Run& run_it) const {
    const Problem& p = forward_.plan.problem;
    const AttentionInputs& inputs = forward_.inputs;
    constexpr std::int64_t guard = 24;
    const auto tensor_of = [&](const std::array<std::int64_t, 4>& shape, DType type) {
      auto tensor = std::make_unique<OwnedTensor>(type, shape, Layout::bnhd, guard);
      std::fill(tensor->memory.begin(), tensor->memory.end(), std::byte{0x5a});
      return tensor;
    };
    std::vector<std::pair<std::string, std::unique_ptr<OwnedTensor>>> owned;
    const auto add = [&](std::string name, const std::array<std::int64_t, 4>& shape, DType type) {
      owned.emplace_back(std::move(name), tensor_of(shape, type));
      return owned.back().second->view;
    };
    Gradients gradients;
    gradients.d_q = add("d_q", {batch_, p.q_heads, p.q_len, p.head_dim}, dtype);
    gradients.d_k = add("d_k", {batch_, p.kv_heads, p.kv_len, p.head_dim}, dtype);
    gradients.d_v = add("d_v", {batch_, p.kv_heads, p.kv_len, p.value_dim}, dtype);
    if (inputs.modifiers.key_bias.data != nullptr) {
      gradients.d_key_bias = add("d_key_bias", inputs.modifiers.key_bias.shape, DType::f32);
    }
    std::vector<float> sinks(inputs.modifiers.sink_logits.size(), 7.0F);
    gradients.d_sink_logits = sinks;
    std::vector<std::vector<float>> weights;
    for (const KeySource& source : inputs.sources) weights.emplace_back(source.log_weight.size(), 7.0F);
    for (std::size_t i = 0; i < inputs.sources.size(); ++i) {
      gradients.sources.push_back({add(fmt::format("source {} d_k", i), inputs.sources[i].k.shape, dtype),
                                   add(fmt::format("source {} d_v", i), inputs.sources[i].v.shape, dtype), weights[i]});
    }
    const AttentionOutputs no_outputs{};
    const kernels::Call call{forward_.plan, inputs, no_outputs, threads, std::size_t{48} << 20};
    const kernels::BackwardCall backward{call, saved, gradients};
    kernels::clear_gradients(backward);
    run_it(backward);
    GradientValues result;
    for (const auto& [name, tensor] : owned) {
      GradientValues::Tensor numbers{name, {}};
      const MutableTensorView& view = tensor->view;
      for (std::int64_t b = 0; b < view.shape[0]; ++b) {
        for (std::int64_t h = 0; h < view.shape[1]; ++h) {
          for (std::int64_t n = 0; n < view.shape[2]; ++n) {
            const std::byte* row = view.row(b, h, n);
            for (std::int64_t d = 0; d < view.shape[3]; ++d) {
              numbers.values.push_back(load_as_float(row, view.dtype, d));
            }
            const auto end = static_cast<std::size_t>(view.shape[3]) * size_of(view.dtype);
            for (std::size_t i = 0; i < guard * size_of(view.dtype); ++i) {
              result.guards_intact = result.guards_intact && row[end + i] == std::byte{0x5a};
            }
          }
        }
      }
      result.tensors.push_back(std::move(numbers));
    }
    result.tensors.push_back({"d_sink_logits", {sinks.begin(), sinks.end()}});
    for (const auto& weight : weights) result.tensors.push_back({"d_log_weight", {weight.begin(), weight.end()}});
    return result;
  }

  GradientValues reference() const {
    return evaluate(DType::f32, 1, [](const kernels::BackwardCall& call) { kernels::run_reference_backward(call); });
  }
  GradientValues with(const kernels::LevelKernels& level, bool key_major, DType dtype, int threads = 2) const {
    return evaluate(dtype, threads,
                    [&](const kernels::BackwardCall& call) { kernels::run_cpu_backward(call, level, key_major); });
  }

  /// The tensors of reference(), each term by its absolute value and delta by that of its terms.
  GradientValues magnitudes() const {
    const Problem& p = forward_.plan.problem;
    const AttentionInputs& inputs = forward_.inputs;
    GradientValues result = reference();
    for (auto& tensor : result.tensors) std::fill(tensor.values.begin(), tensor.values.end(), 0.0);
    const bool bias = inputs.modifiers.key_bias.data != nullptr;
    const std::size_t first_source = bias ? 4 : 3;
    const std::size_t sinks = first_source + 2 * inputs.sources.size();
    const AttentionOutputs no_outputs{};
    const kernels::Call call{forward_.plan, inputs, no_outputs, 1, 0};
    const auto at = [&](std::size_t tensor, const std::array<std::int64_t, 4>& shape, std::int64_t b, std::int64_t h,
                        std::int64_t n) -> double* {
      return result.tensors[tensor].values.data() + ((b * shape[1] + h) * shape[2] + n) * shape[3];
    };
    for (std::int64_t s = 0; s < p.batch; ++s) {
      for (std::int64_t head = 0; head < p.q_heads; ++head) {
        const std::int64_t block = forward_.plan.block_of(s, head);
        const std::int64_t kv_head = head / p.group();
        const auto sources = kernels::reference_sources(call, s, kv_head);
        for (std::int64_t place = 0; place < forward_.plan.queries_of(block); ++place) {
          const kernels::ReferenceRow row{s, head, block, place};
          const std::int64_t query = kernels::query_of(call, row);
          const auto index = static_cast<std::size_t>(call.lse_index(s, head, query));
          const double lse = lse_[index];
          const std::byte* q = call.query_row(inputs.q, s, head, query);
          const std::byte* o = call.query_row(saved.o, s, head, query);
          const std::byte* d_o = call.query_row(saved.d_o, s, head, query);
          const auto x = [](const std::byte* from, DType type, std::int64_t d) {
            return std::fabs(static_cast<double>(load_as_float(from, type, d)));
          };
          double delta = d_lse_.empty() ? 0 : std::fabs(d_lse_[index]);
          for (std::int64_t d = 0; d < p.value_dim; ++d) delta += x(o, DType::f32, d) * x(d_o, saved.d_o.dtype, d);
          const std::int64_t tensor_batch = p.tensor_batch_of(s);
          double* d_q = at(0, {batch_, p.q_heads, p.q_len, p.head_dim}, tensor_batch, head, p.q_begin_of(s) + query);
          for (const kernels::ReferencePair& pair : kernels::pairs_of(call, row, sources)) {
            const bool raw = pair.source == 0;
            const kernels::ReferenceSource& source = sources[pair.source];
            const std::byte* k = source.k.row(pair.key);
            const std::byte* v = source.v.row(pair.key);
            const double probability = std::exp(pair.score - lse);
            double d_p = delta;
            for (std::int64_t d = 0; d < p.value_dim; ++d) d_p += x(v, source.v.dtype, d) * x(d_o, saved.d_o.dtype, d);
            const double d_score = probability * d_p;
            const std::size_t k_tensor = raw ? 1 : first_source + 2 * (pair.source - 1U);
            const std::int64_t keys = raw ? p.kv_len : inputs.sources[pair.source - 1U].k.tokens();
            const std::int64_t b = raw ? tensor_batch : s;
            const std::int64_t key = raw ? p.kv_begin_of(s) + pair.key : pair.key;
            const std::int64_t outer = raw ? batch_ : p.batch;
            double* d_k = at(k_tensor, {outer, p.kv_heads, keys, p.head_dim}, b, kv_head, key);
            double* d_v = at(k_tensor + 1, {outer, p.kv_heads, keys, p.value_dim}, b, kv_head, key);
            const double slope = std::fabs(static_cast<double>(p.softmax_scale()));  // with soft-cap: at most
            for (std::int64_t d = 0; d < p.head_dim; ++d) {
              d_q[d] += d_score * slope * x(k, source.k.dtype, d);
              d_k[d] += d_score * slope * x(q, inputs.q.dtype, d);
            }
            for (std::int64_t d = 0; d < p.value_dim; ++d) d_v[d] += probability * x(d_o, saved.d_o.dtype, d);
            if (raw && bias) {
              const TensorView& view = inputs.modifiers.key_bias;
              *at(3, view.shape, view.batch() == 1 ? 0 : s, head * view.heads() / p.q_heads, key) += d_score;
            }
            auto& weights = raw ? result.tensors[0].values : result.tensors[sinks + pair.source].values;
            if (!raw && !weights.empty())
              weights[static_cast<std::size_t>((s * p.kv_heads + kv_head) * keys + key)] += d_score;
          }
          if (!inputs.modifiers.sink_logits.empty() && !std::isinf(lse)) {
            const auto h = static_cast<std::size_t>(head);
            result.tensors[sinks].values[h] += std::exp(inputs.modifiers.sink_logits[h] - lse) * delta;
          }
        }
      }
    }
    return result;
  }

  /// Error relative to the magnitudes: scores move probabilities by their own error; sums of n terms lose n eps;
  /// probabilities and score gradients rounded to bf16 lose 2^-9 each; a gradient of dtype T rounds by eps(T).
  double tolerance(bool pairs, DType dtype) const {
    const double eps = std::numeric_limits<float>::epsilon();
    const Problem& p = forward_.plan.problem;
    const auto terms = static_cast<double>(p.q_len * p.group() + p.kv_len + p.value_dim + p.head_dim);
    const double rounding = dtype == DType::bf16 ? 1.0 / 256 : dtype == DType::f16 ? 1.0 / 2048 : eps;
    return 3 * static_cast<double>(forward_.lse_tolerance()) + terms * eps + (pairs ? 1.0 / 256 : 0) + rounding;
  }

  SavedForward saved;

 private:
  const KernelCase& forward_;
  std::int64_t batch_ = 1;
  OwnedTensor o_;
  OwnedTensor d_o_;
  std::vector<float> lse_;
  std::vector<float> d_lse_;
};

}  // namespace tessera::testing
