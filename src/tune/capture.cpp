#include "tune/capture.h"

#include <algorithm>

namespace tessera::tune {

AttentionInputs LayerTensors::inputs() const {
  AttentionInputs views;
  views.q = view_of(q.data(), DType::f32, {1, problem.q_heads, problem.q_len, problem.head_dim});
  views.k = view_of(k.data(), DType::f32, {1, problem.kv_heads, problem.kv_len, problem.head_dim});
  views.v = view_of(v.data(), DType::f32, {1, problem.kv_heads, problem.kv_len, problem.value_dim});
  return views;
}

namespace {

/// From [rows][heads][dim] to [heads][tokens][dim].
void scatter(const ProjectedRows& rows, std::span<const float> from, const Problem& problem, std::int64_t heads,
             std::vector<float>& to) {
  const std::int64_t dim = problem.head_dim;
  for (std::int64_t row = 0; row < rows.rows; ++row) {
    for (std::int64_t head = 0; head < heads; ++head) {
      std::copy_n(from.data() + (row * heads + head) * dim, dim,
                  to.data() + (head * problem.q_len + rows.position + row) * dim);
    }
  }
}

}  // namespace

void for_each_layer(const TuningTask& task, std::span<const std::int32_t> tokens, std::string_view phase,
                    const std::function<void(std::int64_t, const LayerTensors&)>& body) {
  const ModelConfig& config = task.model->config();
  LayerTensors tensors;
  tensors.problem.q_heads = config.q_heads;
  tensors.problem.kv_heads = config.kv_heads;
  tensors.problem.q_len = tensors.problem.kv_len = std::ssize(tokens);
  tensors.problem.head_dim = tensors.problem.value_dim = config.head_dim;
  tensors.problem.causal = true;
  const auto rows = static_cast<std::size_t>(std::ssize(tokens) * config.head_dim);
  tensors.q.resize(rows * static_cast<std::size_t>(config.q_heads));
  tensors.k.resize(rows * static_cast<std::size_t>(config.kv_heads));
  tensors.v.resize(rows * static_cast<std::size_t>(config.kv_heads));
  SessionOptions options;
  options.chunk = 0;
  options.run = task.run;
  options.cancelled = task.cancelled;
  options.on_projections = [&](const ProjectedRows& projected) {
    scatter(projected, projected.q, tensors.problem, config.q_heads, tensors.q);
    scatter(projected, projected.k, tensors.problem, config.kv_heads, tensors.k);
    scatter(projected, projected.v, tensors.problem, config.kv_heads, tensors.v);
    if (projected.position + projected.rows < std::ssize(tokens)) return;
    body(projected.layer, tensors);
    task.step(phase, static_cast<double>(projected.layer + 1), static_cast<double>(config.layers));
  };
  Session session(*task.model, options);
  session.prefill(tokens);
}

void for_each_layer(const TuningTask& task, std::span<const std::vector<std::int32_t>> prompts, std::string_view phase,
                    const std::function<void(std::size_t, std::int64_t, const LayerTensors&)>& body) {
  const auto layers = static_cast<double>(task.model->config().layers);
  for (std::size_t prompt = 0; prompt < prompts.size(); ++prompt) {
    TuningTask one = task;
    one.on_progress = [&](std::string_view name, double done, double) {
      task.step(name, static_cast<double>(prompt) * layers + done, static_cast<double>(prompts.size()) * layers);
    };
    for_each_layer(one, prompts[prompt], phase,
                   [&](std::int64_t layer, const LayerTensors& tensors) { body(prompt, layer, tensors); });
  }
}

}  // namespace tessera::tune
