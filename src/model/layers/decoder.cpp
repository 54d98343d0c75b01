#include "model/layers/decoder.h"

#include <algorithm>
#include <cassert>
#include <cstring>

#include "core/parallel.h"
#include "model/layers/elementwise.h"
#include "model/layers/linear.h"

namespace tessera::model {

namespace {

/// Rows that go through projections together: enough for every thread, few enough to bound the scratch.
constexpr std::int64_t kGroupRows = 1024;

void size_to(std::vector<float>& buffer, std::int64_t elements) {
  if (static_cast<std::int64_t>(buffer.size()) < elements) buffer.resize(static_cast<std::size_t>(elements));
}

}  // namespace

Decoder::Decoder(const ModelConfig& config, const Weights& weights)
    : config_(config), weights_(weights), rope_(config.head_dim, config.rope_theta) {}

std::int64_t Decoder::bytes_per_token(const ModelConfig& config) {
  return static_cast<std::int64_t>(sizeof(float)) * (config.hidden_size + 2 * config.q_heads * config.head_dim);
}

void Decoder::release() {
  for (std::vector<float>* buffer :
       {&hidden_, &queries_, &attended_, &normed_, &projected_, &keys_, &values_, &gate_, &up_, &rotations_}) {
    std::vector<float>().swap(*buffer);  // assigning {} would keep the memory
  }
}

std::span<const float> Decoder::forward(std::span<const std::int32_t> tokens,
                                        std::span<const std::unique_ptr<LayerCache>> caches, const AttentionCall& call,
                                        double& attention_ms) {
  assert(static_cast<std::int64_t>(caches.size()) == config_.layers);
  rows_ = static_cast<std::int64_t>(tokens.size());
  const std::int64_t hidden = config_.hidden_size;
  const int threads = call.run.threads;
  size_to(hidden_, rows_ * hidden);
  size_to(queries_, rows_ * config_.q_heads * config_.head_dim);
  size_to(attended_, rows_ * config_.q_heads * config_.head_dim);
  const std::int64_t group = std::min(rows_, kGroupRows);
  size_to(normed_, group * hidden);
  size_to(projected_, group * hidden);
  size_to(keys_, group * config_.kv_heads * config_.head_dim);
  size_to(values_, group * config_.kv_heads * config_.head_dim);
  size_to(gate_, group * config_.intermediate_size);
  size_to(up_, group * config_.intermediate_size);

  for (std::int64_t row = 0; row < rows_; ++row) {
    const std::int64_t token = tokens[static_cast<std::size_t>(row)];
    assert(token >= 0 && token < config_.vocab_size);
    std::memcpy(hidden_.data() + row * hidden, weights_.embedding.values.data() + token * hidden,
                static_cast<std::size_t>(hidden) * sizeof(float));
  }
  for (std::int64_t i = 0; i < config_.layers; ++i) {
    const LayerWeights& layer = weights_.layers[static_cast<std::size_t>(i)];
    LayerCache& cache = *caches[static_cast<std::size_t>(i)];
    project_inputs(i, cache, call);
    attend(i, cache, call, attention_ms);
    finish_layer(layer, threads);
    if (call.after_layer) call.after_layer(i + 1);
  }
  return {hidden_.data(), static_cast<std::size_t>(rows_ * hidden)};
}

void Decoder::project_inputs(std::int64_t layer_index, LayerCache& cache, const AttentionCall& call) {
  const LayerWeights& layer = weights_.layers[static_cast<std::size_t>(layer_index)];
  const int threads = call.run.threads;
  const std::int64_t position = cache.tokens();
  const std::int64_t hidden = config_.hidden_size;
  const std::int64_t q_width = config_.q_heads * config_.head_dim;
  const std::int64_t kv_width = config_.kv_heads * config_.head_dim;
  for (std::int64_t first = 0; first < rows_; first += kGroupRows) {
    const std::int64_t rows = std::min(kGroupRows, rows_ - first);
    float* queries = queries_.data() + first * q_width;
    rms_norm(hidden_.data() + first * hidden, rows, layer.attention_norm.values, config_.norm_epsilon, normed_.data(),
             threads);
    linear(layer.q.values, hidden, q_width, normed_.data(), rows, queries, threads);
    linear(layer.k.values, hidden, kv_width, normed_.data(), rows, keys_.data(), threads);
    linear(layer.v.values, hidden, kv_width, normed_.data(), rows, values_.data(), threads);
    rope_.tables(position + first, rows, rotations_);
    constexpr std::int64_t rows_per_item = 32;
    parallel_for((rows + rows_per_item - 1) / rows_per_item, threads, [&](std::int64_t item, int) {
      const std::int64_t begin = item * rows_per_item;
      const std::int64_t end = std::min(rows, begin + rows_per_item);
      for (std::int64_t row = begin; row < end; ++row) {
        const float* table = rotations_.data() + row * config_.head_dim;
        rope_.rotate(queries + row * q_width, config_.q_heads, table);
        rope_.rotate(keys_.data() + row * kv_width, config_.kv_heads, table);
      }
    });
    if (call.on_projections) {
      const auto kv_size = static_cast<std::size_t>(rows * kv_width);
      call.on_projections({.layer = layer_index,
                           .position = position + first,
                           .rows = rows,
                           .q = {queries, static_cast<std::size_t>(rows * q_width)},
                           .k = std::span(keys_).first(kv_size),
                           .v = std::span(values_).first(kv_size)});
    }
    cache.append(rows, keys_.data(), values_.data(), threads);
  }
}

void Decoder::attend(std::int64_t layer_index, LayerCache& cache, const AttentionCall& call, double& attention_ms) {
  const std::array<std::int64_t, 4> shape{1, config_.q_heads, rows_, config_.head_dim};
  Plan plan;
  CacheCall cache_call;
  cache_call.method = call.method;
  cache_call.prompt = call.prompt;
  cache_call.q = view_of(queries_.data(), DType::f32, shape, Layout::bnhd);
  cache_call.outputs = {mutable_view_of(attended_.data(), DType::f32, shape, Layout::bnhd), {}};
  cache_call.executed = call.on_plan ? &plan : nullptr;
  const PlanContext context{.layer = layer_index, .layers = config_.layers, .state = call.state, .run = call.run};
  const RunReport report = cache.attend(cache_call, context);
  attention_ms += report.plan_ms + report.kernel_ms;
  if (call.on_plan && call.method->info().has_plan) call.on_plan(layer_index, plan);
  if (call.prompt_ends) cache.finish_prefill(context);
}

void Decoder::finish_layer(const LayerWeights& layer, int threads) {
  const std::int64_t hidden = config_.hidden_size;
  const std::int64_t q_width = config_.q_heads * config_.head_dim;
  const std::int64_t inner = config_.intermediate_size;
  for (std::int64_t first = 0; first < rows_; first += kGroupRows) {
    const std::int64_t rows = std::min(kGroupRows, rows_ - first);
    float* residual = hidden_.data() + first * hidden;
    linear(layer.o.values, q_width, hidden, attended_.data() + first * q_width, rows, projected_.data(), threads);
    add(residual, projected_.data(), rows, hidden, threads);
    rms_norm(residual, rows, layer.mlp_norm.values, config_.norm_epsilon, normed_.data(), threads);
    linear(layer.gate.values, hidden, inner, normed_.data(), rows, gate_.data(), threads);
    linear(layer.up.values, hidden, inner, normed_.data(), rows, up_.data(), threads);
    silu_product(gate_.data(), up_.data(), rows, inner, threads);
    linear(layer.down.values, inner, hidden, gate_.data(), rows, projected_.data(), threads);
    add(residual, projected_.data(), rows, hidden, threads);
  }
}

void Decoder::head(std::span<const float> hidden, std::vector<float>& logits, int threads) {
  const auto rows = static_cast<std::int64_t>(hidden.size()) / config_.hidden_size;
  size_to(normed_, rows * config_.hidden_size);
  logits.resize(static_cast<std::size_t>(rows * config_.vocab_size));
  rms_norm(hidden.data(), rows, weights_.norm.values, config_.norm_epsilon, normed_.data(), threads);
  linear(weights_.head_of(config_).values, config_.hidden_size, config_.vocab_size, normed_.data(), rows, logits.data(),
         threads);
}

}  // namespace tessera::model
