// Gated attention (arXiv:2505.06708): the output of any method, times a sigmoid of gate logits.
//
// Per head, Y' = Y * sigmoid(gate), with one logit per query (headwise) or one per value column (elementwise). The
// logits come from the layer's normed input, not from Y, and are the side input `gate`. Position G1 of the paper: after
// attention, before the output projection.
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
            .phases = {.prefill = true, .decode = true},
            .side = {
                {.name = "gate",
                 .axes = {SideAxis::batch, SideAxis::q_heads, SideAxis::queries, SideAxis::value_dim},
                 .minimum = -4,
                 .maximum = 4,
                 .description = "gate logits of the call's queries, per value column or, with last axis 1, per head"}}};
  }

  explicit Gated(Params given) : params(std::move(given)), inner(make_inner(params.inner)) {}

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

  std::unique_ptr<MethodState> new_state() const { return inner->new_state(); }

  static std::unique_ptr<const Method> make_inner(const std::string& spec) {
    require(spec != "gated", "gated: inner=gated; expected another method");
    return make_method(spec);
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
