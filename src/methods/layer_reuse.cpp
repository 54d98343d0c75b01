#include "methods/layer_reuse.h"

#include <chrono>
#include <limits>

#include "core/error.h"

namespace tessera {

namespace {

double milliseconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
}

LayerReuseState* state_of(const PlanContext& context) {
  return dynamic_cast<LayerReuseState*>(context.state);
}

}  // namespace

bool is_decoding_step(const Problem& problem) {
  if (problem.variable_length() || problem.q_len != 1 || problem.kv_len == 0) return false;
  return !problem.causal || problem.q_offset_of(0) >= problem.kv_len - 1;
}

Plan plan_with_reuse(LayerMode mode, const Problem& problem, const PlanContext& context) {
  const LayerReuseState* state = state_of(context);
  const bool chosen = mode == LayerMode::reuse && state != nullptr && is_decoding_step(problem) && state->layer >= 0 &&
                      state->layer < context.layer && state->selection.kv_len == problem.kv_len;
  if (!chosen) return dense_plan(problem);
  const score::Selection& selection = state->selection;
  require(
      std::ssize(selection.lists) == problem.batch * selection.heads &&
          (selection.heads == 1 || selection.heads == problem.kv_heads || selection.heads == problem.q_heads),
      "the state holds the choice of layer {}, {} lists of {} heads; this call has {} sequences, {} query heads and {} "
      "kv heads",
      state->layer, selection.lists.size(), selection.heads, problem.batch, problem.q_heads, problem.kv_heads);
  return score::plan_of(problem, selection);
}

RunReport attend_with_reuse(LayerMode mode, const ChooseKeys& choose, const Problem& problem,
                            const AttentionInputs& inputs, const AttentionOutputs& outputs, const PlanContext& context,
                            Plan* executed) {
  auto start = std::chrono::steady_clock::now();
  Plan plan = plan_with_reuse(mode, problem, context);
  double plan_ms = milliseconds_since(start);
  LayerReuseState* state = state_of(context);
  const bool publishes = mode == LayerMode::publish && state != nullptr && is_decoding_step(problem);
  AttentionOutputs written = outputs;
  if (publishes) {
    const auto rows = static_cast<std::size_t>(problem.batch * problem.q_heads);
    if (written.scores.data == nullptr) {
      state->scores.assign(rows * static_cast<std::size_t>(problem.kv_len), -std::numeric_limits<float>::infinity());
      written.scores =
          mutable_view_of(state->scores.data(), DType::f32, {problem.batch, problem.q_heads, 1, problem.kv_len});
    }
    if (written.lse.empty()) {
      state->lse.resize(rows);
      written.lse = state->lse;
    }
  }
  RunReport report = run(plan, inputs, written, context.run);
  if (publishes) {
    start = std::chrono::steady_clock::now();
    state->selection = choose(problem, written.scores, written.lse, context.run.threads);
    state->layer = context.layer;
    plan_ms += milliseconds_since(start);
  }
  report.plan_ms = plan_ms;
  if (executed != nullptr) *executed = std::move(plan);
  return report;
}

}  // namespace tessera
