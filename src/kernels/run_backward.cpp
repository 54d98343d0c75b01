// The backward pass: checks what the kernels rely on, chooses kernel and instruction set.
#include <algorithm>
#include <array>
#include <chrono>

#include "core/error.h"
#include "core/parallel.h"
#include "kernels/backward.h"
#include "kernels/cpu/cpu.h"

namespace tessera {

namespace {

using Shape = std::array<std::int64_t, 4>;

template <class View>
void check_view(const View& view, const Shape& expected, std::string_view name) {
  require(is_attention_dtype(view.dtype), "{} has dtype {}; expected f32, bf16 or f16", name, name_of(view.dtype));
  require(view.shape == expected, "{} has shape [{}]; expected [{}]", name, fmt::join(view.shape, ", "),
          fmt::join(expected, ", "));
  require(view.strides[3] == 1, "{} has stride {} on its last axis; expected 1", name, view.strides[3]);
}

void check_gradient(const MutableTensorView& view, const Shape& expected, std::string_view name) {
  if (view.data != nullptr) check_view(view, expected, name);
}

template <class Span>
void check_size(const Span& span, std::int64_t expected, std::string_view name) {
  require(span.empty() || static_cast<std::int64_t>(span.size()) == expected, "{} has {} elements; expected {}", name,
          span.size(), expected);
}

void check_saved(const Problem& problem, const SavedForward& saved) {
  const std::int64_t batch = problem.variable_length() ? 1 : problem.batch;
  const Shape shape{batch, problem.q_heads, problem.q_len, problem.value_dim};
  require(saved.o.data != nullptr, "o has no data");
  require(saved.d_o.data != nullptr, "d_o has no data");
  check_view(saved.o, shape, "o");
  check_view(saved.d_o, shape, "d_o");
  const std::int64_t rows = batch * problem.q_heads * problem.q_len;
  require(static_cast<std::int64_t>(saved.lse.size()) == rows, "lse has {} elements; expected {}", saved.lse.size(),
          rows);
  check_size(saved.d_lse, rows, "d_lse");
}

void check_gradients(const Problem& problem, const AttentionInputs& inputs, const Gradients& gradients) {
  const std::int64_t batch = problem.variable_length() ? 1 : problem.batch;
  check_gradient(gradients.d_q, {batch, problem.q_heads, problem.q_len, problem.head_dim}, "d_q");
  check_gradient(gradients.d_k, {batch, problem.kv_heads, problem.kv_len, problem.head_dim}, "d_k");
  check_gradient(gradients.d_v, {batch, problem.kv_heads, problem.kv_len, problem.value_dim}, "d_v");
  if (gradients.d_key_bias.data != nullptr) {
    require(inputs.modifiers.key_bias.data != nullptr, "d_key_bias is wanted, but there is no key_bias");
    check_view(gradients.d_key_bias, inputs.modifiers.key_bias.shape, "d_key_bias");
    require(gradients.d_key_bias.dtype == DType::f32, "d_key_bias has dtype {}; expected f32",
            name_of(gradients.d_key_bias.dtype));
  }
  require(gradients.d_sink_logits.empty() || !inputs.modifiers.sink_logits.empty(),
          "d_sink_logits is wanted, but there are no sink_logits");
  check_size(gradients.d_sink_logits, problem.q_heads, "d_sink_logits");
  require(gradients.d_weight_factors.empty() || inputs.modifiers.weights == RowWeights::reweighted,
          "d_weight_factors is wanted, but the weights are {}; expected reweighted", name_of(inputs.modifiers.weights));
  check_size(gradients.d_weight_factors, batch * problem.q_heads * problem.q_len, "d_weight_factors");
  require(gradients.sources.empty() || gradients.sources.size() == inputs.sources.size(),
          "gradients of {} key sources are wanted; the call has {}", gradients.sources.size(), inputs.sources.size());
  for (std::size_t i = 0; i < gradients.sources.size(); ++i) {
    const KeySource& source = inputs.sources[i];
    check_gradient(gradients.sources[i].d_k, source.k.shape, "d_k of a key source");
    check_gradient(gradients.sources[i].d_v, source.v.shape, "d_v of a key source");
    require(gradients.sources[i].d_log_weight.empty() || !source.log_weight.empty(),
            "d_log_weight of key source {} is wanted, but it has no log_weight", i + 1);
    check_size(gradients.sources[i].d_log_weight, static_cast<std::int64_t>(source.log_weight.size()), "d_log_weight");
  }
}

void clear(const MutableTensorView& view) {
  if (view.data == nullptr) return;
  for (std::int64_t b = 0; b < view.shape[0]; ++b) {
    for (std::int64_t h = 0; h < view.shape[1]; ++h) {
      for (std::int64_t n = 0; n < view.shape[2]; ++n) {
        std::fill_n(view.row(b, h, n), static_cast<std::size_t>(view.shape[3]) * size_of(view.dtype), std::byte{0});
      }
    }
  }
}

/// As in the forward pass: few rows per key tile walk the keys.
KernelKind choose_kernel(const Plan& plan) {
  constexpr std::int64_t few_rows = 32;
  const Problem& problem = plan.problem;
  const std::int64_t heads_per_row = plan.plan_heads == problem.q_heads ? 1 : problem.group();
  const bool few = plan.tile_q * heads_per_row < few_rows;
  return few && kernels::can_run_key_major(plan) ? KernelKind::key_major : KernelKind::query_major;
}

}  // namespace

void kernels::clear_gradients(const BackwardCall& call) {
  const Gradients& gradients = call.gradients;
  // Rows outside a query subset belong to no tile; sums of biases gather from call to call of a kernel.
  if (!call.call.plan.query_order.empty()) clear(gradients.d_q);
  clear(gradients.d_key_bias);
  std::fill(gradients.d_weight_factors.begin(), gradients.d_weight_factors.end(), 0.0F);
  for (const SourceGradients& source : gradients.sources) {
    std::fill(source.d_log_weight.begin(), source.d_log_weight.end(), 0.0F);
  }
}

RunReport run_backward(const Plan& plan, const AttentionInputs& inputs, const SavedForward& saved,
                       const Gradients& gradients, const RunOptions& options) {
  check_inputs(plan.problem, inputs);
  kernels::check_key_sources(plan, inputs);
  check_saved(plan.problem, saved);
  check_gradients(plan.problem, inputs, gradients);
  require(!inputs.pages.used(), "keys and values lie in pages; the backward pass needs them in one tensor");
  require(options.threads >= 0, "threads is {}; expected 0 (all) or more", options.threads);

  const auto start = std::chrono::steady_clock::now();
  const AttentionOutputs no_outputs{};
  const kernels::Call call{
      plan, inputs, no_outputs, thread_count(options.threads), options.workspace_bytes, options.workspace};
  const kernels::BackwardCall backward{call, saved, gradients};
  kernels::clear_gradients(backward);
  RunReport report;
  report.kernel = options.kernel == KernelKind::automatic ? choose_kernel(plan) : options.kernel;
  report.isa = options.isa.value_or(default_isa());
  report.threads = call.threads;
  require(report.kernel != KernelKind::split_key, "the split-key kernel has no backward pass");
  if (report.kernel == KernelKind::reference) {
    kernels::run_reference_backward(backward);
  } else {
    const bool key_major = report.kernel == KernelKind::key_major;
    require(!key_major || kernels::can_run_key_major(plan),
            "the key-major kernel runs plans of whole key tiles in natural order");
    report.workspace_bytes = kernels::run_cpu_backward(backward, kernels::level_of(report.isa), key_major);
  }
  report.kernel_ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  return report;
}

}  // namespace tessera
