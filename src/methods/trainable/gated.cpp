// Gated attention (arXiv:2505.06708): the output of any method, times a sigmoid of gate logits.
//
// Per head, Y' = Y * sigmoid(gate), with one logit per query (headwise) or one per value column (elementwise). The
// logits come from the layer's normed input, not from Y, and are the side input `gate`. Position G1 of the paper: after
// attention, before the output projection.
//
// Backward, with s = sigmoid(gate): d_gate = dY' Y' (1 - s), summed over the columns that share a logit, and the inner
// method's backward pass for Y = Y' / s under dY = s dY'. Where s is so small that Y' says little about Y, dY is as
// small; Y counts only in products with it.
//
// A cache of the inner method's own is not used: the calls of a cache carry no gates.
#include <array>
#include <cmath>

#include "core/error.h"
#include "core/parallel.h"
#include "methods/registry.h"

namespace tessera {
namespace {

struct Gated {
  struct Params {
    std::string inner = "dense";
    void visit(ParameterList& v) {
      v("inner", inner, "method whose output is gated: a name with its defaults, or a JSON file");
    }
  };
  static MethodInfo info() {
    return {.name = "gated",
            .family = "trainable",
            .summary = "output of any method times a sigmoid gate per head or per value column (side input gate)",
            .paper =
                "Gated Attention for Large Language Models: Non-linearity, Sparsity, and Attention-Sink-Free, "
                "arXiv:2505.06708",
            .phases = {.prefill = true, .decode = true, .backward = true},
            .side = {
                {.name = "gate",
                 .axes = {SideAxis::batch, SideAxis::q_heads, SideAxis::queries, SideAxis::value_dim},
                 .minimum = -4,
                 .maximum = 4,
                 .description = "gate logits of the call's queries, per value column or, with last axis 1, per head"}}};
  }

  explicit Gated(Params given) : params(std::move(given)), inner(make_inner(params.inner)) {}

  std::int64_t prefill_tile() const { return inner->prefill_tile(); }

  Plan plan(const Problem& problem, const AttentionInputs& inputs, const PlanContext& context) const {
    return inner->plan(problem, inputs, context);
  }

  RunReport attend(const Problem& problem, const AttentionInputs& inputs, const AttentionOutputs& outputs,
                   const PlanContext& context, Plan* executed) const {
    const TensorView& gate = gate_of(problem, inputs);
    const RunReport report = inner->attend(problem, inputs, outputs, context, executed);
    const auto [batch, heads, tokens, dim] = outputs.o.shape;
    parallel_for(batch * heads, context.run.threads,
                 [&, heads = heads, tokens = tokens, dim = dim](std::int64_t i, int) {
                   for (std::int64_t n = 0; n < tokens; ++n) {
                     const std::byte* logits = gate.row(i / heads, i % heads, n);
                     std::byte* row = outputs.o.row(i / heads, i % heads, n);
                     for (std::int64_t d = 0; d < dim; ++d) {
                       const float logit = load_as_float(logits, gate.dtype, gate.dim() == 1 ? 0 : d);
                       const float value = load_as_float(row, outputs.o.dtype, d);
                       store_from_float(row, outputs.o.dtype, d, value / (1 + std::exp(-logit)));
                     }
                   }
                 });
    return report;
  }

  /// Throws Error where the inner method has no backward pass.
  RunReport backward(const Problem& problem, const AttentionInputs& inputs, const SavedForward& saved,
                     const Gradients& gradients, const PlanContext& context, const Plan* executed) const {
    require(inner->info().phases.backward, "gated: inner={} has no backward pass", inner->info().name);
    const TensorView& gate = gate_of(problem, inputs);
    const MutableTensorView d_gate = gate_gradient(gate, gradients);
    const std::array<std::int64_t, 4> shape{gate.batch(), problem.q_heads, problem.q_len, problem.value_dim};
    for (const TensorView* view : {&saved.o, &saved.d_o}) {
      require(view->data != nullptr && is_attention_dtype(view->dtype) && view->shape == shape && view->strides[3] == 1,
              "gated: {} is {} [{}]; expected f32, bf16 or f16 [{}]", view == &saved.o ? "o" : "d_o",
              name_of(view->dtype), fmt::join(view->shape, ", "), fmt::join(shape, ", "));
    }
    const std::int64_t rows = shape[0] * shape[1] * shape[2];
    const std::int64_t dim = shape[3];
    std::vector<float> ungated(static_cast<std::size_t>(rows * dim));
    std::vector<std::byte> memory(ungated.size() * size_of(saved.d_o.dtype));
    const MutableTensorView o = mutable_view_of(ungated.data(), DType::f32, shape);
    // The dtype of the given gradient: with it the inner kernels multiply bf16 where the caller does.
    const MutableTensorView d_o = mutable_view_of(memory.data(), saved.d_o.dtype, shape);
    parallel_for(shape[0] * shape[1], context.run.threads, [&](std::int64_t i, int) {
      const std::int64_t b = i / shape[1];
      const std::int64_t h = i % shape[1];
      for (std::int64_t n = 0; n < shape[2]; ++n) {
        const std::byte* logits = gate.row(b, h, n);
        double sum = 0;
        for (std::int64_t d = 0; d < dim; ++d) {
          const float logit = load_as_float(logits, gate.dtype, gate.dim() == 1 ? 0 : d);
          const float s = 1 / (1 + std::exp(-logit));
          const float gated = load_as_float(saved.o.row(b, h, n), saved.o.dtype, d);
          const float slope = load_as_float(saved.d_o.row(b, h, n), saved.d_o.dtype, d);
          store_from_float(o.row(b, h, n), DType::f32, d, s > 0 ? gated / s : 0.0F);
          store_from_float(d_o.row(b, h, n), d_o.dtype, d, slope * s);
          // 1 - s keeps its digits where s is close to 1.
          const double by_logit = static_cast<double>(slope) * gated / (1 + std::exp(static_cast<double>(logit)));
          sum += by_logit;
          if (d_gate.data != nullptr && gate.dim() != 1) {
            store_from_float(d_gate.row(b, h, n), d_gate.dtype, d, static_cast<float>(by_logit));
          }
        }
        if (d_gate.data != nullptr && gate.dim() == 1) {
          store_from_float(d_gate.row(b, h, n), d_gate.dtype, 0, static_cast<float>(sum));
        }
      }
    });
    SavedForward within = saved;
    within.o = o;
    within.d_o = d_o;
    return inner->backward(problem, inputs_within(inputs), within, gradients_within(gradients), context, executed);
  }

  std::unique_ptr<MethodState> new_state() const { return inner->new_state(); }
  void check_model(std::int64_t layers, std::int64_t q_heads, std::int64_t kv_heads) const {
    inner->check_model(layers, q_heads, kv_heads);
  }

  /// What the inner method reads and writes: everything but the gate.
  static AttentionInputs inputs_within(AttentionInputs inputs) {
    std::erase_if(inputs.side, [](const SideTensor& side) { return side.name == "gate"; });
    return inputs;
  }
  static Gradients gradients_within(Gradients gradients) {
    std::erase_if(gradients.side, [](const SideGradient& side) { return side.name == "gate"; });
    return gradients;
  }

  static MutableTensorView gate_gradient(const TensorView& gate, const Gradients& gradients) {
    const MutableTensorView* wanted = gradients.find_side("gate");
    if (wanted == nullptr) return {};
    require(is_attention_dtype(wanted->dtype) && wanted->shape == gate.shape && wanted->strides[3] == 1,
            "gated: gradient of gate is {} [{}]; expected f32, bf16 or f16 [{}]", name_of(wanted->dtype),
            fmt::join(wanted->shape, ", "), fmt::join(gate.shape, ", "));
    return *wanted;
  }

  static std::unique_ptr<const Method> make_inner(const std::string& spec) {
    require(spec != "gated", "gated: inner=gated; expected another method");  // its own inner would be dense
    std::unique_ptr<const Method> method = make_method(spec);
    require(method->info().name != "gated", "gated: inner={} is gated itself; expected another method", spec);
    return method;
  }

  static const TensorView& gate_of(const Problem& problem, const AttentionInputs& inputs) {
    const TensorView* gate = inputs.find_side("gate");
    const std::int64_t batch = problem.variable_length() ? 1 : problem.batch;
    require(gate != nullptr, "gated: side input 'gate' is missing; expected logits [{}, {}, {}, 1 or {}]", batch,
            problem.q_heads, problem.q_len, problem.value_dim);
    require(is_attention_dtype(gate->dtype) && gate->batch() == batch && gate->heads() == problem.q_heads &&
                gate->tokens() == problem.q_len && (gate->dim() == 1 || gate->dim() == problem.value_dim) &&
                gate->strides[3] == 1,
            "gated: gate is {} [{}]; expected f32, bf16 or f16 [{}, {}, {}, 1 or {}]", name_of(gate->dtype),
            fmt::join(gate->shape, ", "), batch, problem.q_heads, problem.q_len, problem.value_dim);
    return *gate;
  }

  Params params;
  std::unique_ptr<const Method> inner;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(gated, tessera::Gated);
