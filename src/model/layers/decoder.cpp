#include "model/layers/decoder.h"

#include <algorithm>
#include <array>
#include <cassert>
#include <cmath>
#include <cstring>

#include "core/parallel.h"
#include "model/layers/elementwise.h"
#include "model/layers/layer_method.h"
#include "model/products.h"

namespace tessera::model {

namespace {

/// Rows that go through projections together: enough for every thread, few enough to bound the scratch.
constexpr std::int64_t kGroupRows = 1024;

void size_to(std::vector<float>& buffer, std::int64_t elements) {
  if (static_cast<std::int64_t>(buffer.size()) < elements) buffer.resize(static_cast<std::size_t>(elements));
}

}  // namespace

Decoder::Decoder(const ModelConfig& config, const Weights& weights)
    : config_(config),
      weights_(weights),
      rope_(config.rope, config.head_dim),
      local_rope_(config.local_rope, config.head_dim),
      feed_forward_(config) {}

std::int64_t Decoder::bytes_per_token(const ModelConfig& config) {
  return static_cast<std::int64_t>(sizeof(float)) * (config.hidden_size + 2 * config.q_heads * config.head_dim);
}

std::int64_t Decoder::scratch_bytes(const ModelConfig& config) {
  const std::int64_t floats =
      2 * config.hidden_size + (2 * config.kv_heads + 1) * config.head_dim + FeedForward::floats_per_row(config);
  return static_cast<std::int64_t>(sizeof(float)) * kGroupRows * floats;
}

void Decoder::release() {
  for (std::vector<float>* buffer : {&hidden_, &queries_, &attended_, &normed_, &projected_, &keys_, &values_}) {
    std::vector<float>().swap(*buffer);  // assigning {} would keep the memory
  }
  rotations_ = {};
  local_rotations_ = {};
  feed_forward_.release();
  scratch_ = {};
}

std::span<const float> Decoder::forward(std::span<const std::int32_t> tokens,
                                        std::span<const std::unique_ptr<LayerCache>> caches, const AttentionCall& call,
                                        double& attention_ms) {
  assert(static_cast<std::int64_t>(caches.size()) == config_.layers);
  rows_ = static_cast<std::int64_t>(tokens.size());
  const std::int64_t hidden = config_.hidden_size;
  size_to(hidden_, rows_ * hidden);
  size_to(queries_, rows_ * config_.q_heads * config_.head_dim);
  size_to(attended_, rows_ * config_.q_heads * config_.head_dim);
  const std::int64_t group = std::min(rows_, kGroupRows);
  size_to(normed_, group * hidden);
  size_to(projected_, group * hidden);
  size_to(keys_, group * config_.kv_heads * config_.head_dim);
  size_to(values_, group * config_.kv_heads * config_.head_dim);

  for (std::int64_t row = 0; row < rows_; ++row) {
    const std::int64_t token = tokens[static_cast<std::size_t>(row)];
    assert(token >= 0 && token < config_.vocab_size);
    weights_.embedding->row(token, hidden_.data() + row * hidden);
  }
  if (config_.embedding_scale != 1) {
    scale(hidden_.data(), rows_, hidden, static_cast<float>(config_.embedding_scale), call.run.threads);
  }
  for (std::int64_t i = 0; i < config_.layers; ++i) {
    LayerCache& cache = *caches[static_cast<std::size_t>(i)];
    project_inputs(i, cache, call);
    attend(i, cache, call, attention_ms);
    finish_layer(i, products(call.run, call.exact));
    if (call.after_layer) call.after_layer(i + 1);
  }
  return {hidden_.data(), static_cast<std::size_t>(rows_ * hidden)};
}

void Decoder::project_inputs(std::int64_t layer_index, LayerCache& cache, const AttentionCall& call) {
  const LayerWeights& layer = weights_.layers[static_cast<std::size_t>(layer_index)];
  const LayerRope kind = config_.layer(layer_index).rope;
  const int threads = call.run.threads;
  const ProductOptions options = products(call.run, call.exact);
  const std::int64_t position = cache.tokens();
  const std::int64_t hidden = config_.hidden_size;
  const std::int64_t q_width = config_.q_heads * config_.head_dim;
  const std::int64_t kv_width = config_.kv_heads * config_.head_dim;
  for (std::int64_t first = 0; first < rows_; first += kGroupRows) {
    const std::int64_t rows = std::min(kGroupRows, rows_ - first);
    float* queries = queries_.data() + first * q_width;
    rms_norm(hidden_.data() + first * hidden, rows, layer.attention_norm, config_.norm_epsilon, normed_.data(),
             threads);
    const std::array<MatrixProduct, 3> inputs{
        {{layer.q.get(), queries}, {layer.k.get(), keys_.data()}, {layer.v.get(), values_.data()}}};
    multiply_together(inputs, normed_.data(), rows, options);
    add_bias(queries, rows, layer.q_bias, threads);
    add_bias(keys_.data(), rows, layer.k_bias, threads);
    add_bias(values_.data(), rows, layer.v_bias, threads);
    if (config_.qk_norm) {
      rms_norm(queries, rows * config_.q_heads, layer.q_norm, config_.norm_epsilon, queries, threads);
      rms_norm(keys_.data(), rows * config_.kv_heads, layer.k_norm, config_.norm_epsilon, keys_.data(), threads);
    }
    if (kind != LayerRope::none) {
      rotate(kind == LayerRope::local ? local_rope_ : rope_, position + first, rows, call, queries);
    }
    if (config_.attention_scale != 0) {
      // Methods and caches scale by 1 / sqrt(head_dim); the rest of the model's own scale goes into the queries.
      const double factor = config_.attention_scale * std::sqrt(static_cast<double>(config_.head_dim));
      if (factor != 1) scale(queries, rows, q_width, static_cast<float>(factor), threads);
    }
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

void Decoder::rotate(const Rope& rope, std::int64_t position, std::int64_t rows, const AttentionCall& call,
                     float* queries) {
  Rotations& own = &rope == &local_rope_ ? local_rotations_ : rotations_;
  const std::int64_t length = std::max(call.length, position + rows);
  if (own.position != position || own.rows != rows || own.length != length) {
    rope.tables(position, rows, length, own.tables);
    own.position = position;
    own.rows = rows;
    own.length = length;
  }
  constexpr std::int64_t rows_per_item = 32;
  parallel_for((rows + rows_per_item - 1) / rows_per_item, call.run.threads, [&](std::int64_t item, int) {
    const std::int64_t begin = item * rows_per_item;
    const std::int64_t end = std::min(rows, begin + rows_per_item);
    for (std::int64_t row = begin; row < end; ++row) {
      const float* table = own.tables.data() + row * rope.dims();
      rope.rotate(queries + row * config_.q_heads * config_.head_dim, config_.q_heads, table);
      rope.rotate(keys_.data() + row * config_.kv_heads * config_.head_dim, config_.kv_heads, table);
    }
  });
}

TensorView Decoder::attending_queries(const AttentionCall& call) {
  const std::array<std::int64_t, 4> shape{1, config_.q_heads, rows_, config_.head_dim};
  const ProductLevel& level = products_of(call.run.isa.value_or(default_isa()));
  if (!call.round_queries || level.round_pairs == nullptr) {
    return view_of(queries_.data(), DType::f32, shape, Layout::bnhd);
  }
  // A rounded row takes the first half of its own place.
  const std::int64_t width = config_.q_heads * config_.head_dim;
  constexpr std::int64_t rows_per_item = 32;
  parallel_for((rows_ + rows_per_item - 1) / rows_per_item, call.run.threads, [&](std::int64_t item, int) {
    std::vector<std::uint16_t> rounded(static_cast<std::size_t>(width + 1));
    for (std::int64_t row = item * rows_per_item; row < std::min(rows_, (item + 1) * rows_per_item); ++row) {
      float* place = queries_.data() + row * width;
      level.round_pairs(place, width, rounded.data(), (width + 1) / 2);
      std::memcpy(place, rounded.data(), static_cast<std::size_t>(width) * sizeof(std::uint16_t));
    }
  });
  TensorView view = view_of(queries_.data(), DType::bf16, shape, Layout::bnhd);
  view.strides[0] *= 2;
  view.strides[2] *= 2;
  return view;
}

void Decoder::attend(std::int64_t layer_index, LayerCache& cache, const AttentionCall& call, double& attention_ms) {
  const std::array<std::int64_t, 4> shape{1, config_.q_heads, rows_, config_.head_dim};
  const LayerMethod method(*call.method, config_.layer(layer_index).window,
                           static_cast<float>(config_.attention_softcap));
  const bool changed = config_.layer(layer_index).window > 0 || config_.attention_softcap != 0;
  Plan plan;
  CacheCall cache_call;
  cache_call.method = changed ? &method : call.method;
  cache_call.prompt = call.prompt;
  cache_call.q = attending_queries(call);
  cache_call.outputs = {mutable_view_of(attended_.data(), DType::f32, shape, Layout::bnhd), {}};
  cache_call.executed = call.on_plan ? &plan : nullptr;
  const PlanContext context{.layer = layer_index, .layers = config_.layers, .state = call.state, .run = call.run};
  const RunReport report = cache.attend(cache_call, context);
  attention_ms += report.plan_ms + report.kernel_ms;
  if (call.on_plan && call.method->info().has_plan) call.on_plan(layer_index, plan);
  if (call.prompt_ends) cache.finish_prefill(context);
}

void Decoder::finish_layer(std::int64_t layer_index, const ProductOptions& options) {
  const LayerWeights& layer = weights_.layers[static_cast<std::size_t>(layer_index)];
  const std::int64_t hidden = config_.hidden_size;
  const std::int64_t q_width = config_.q_heads * config_.head_dim;
  const int threads = options.threads;
  const auto join = [&](float* residual, std::int64_t rows, const std::vector<float>& post_norm) {
    if (!post_norm.empty()) {
      rms_norm(projected_.data(), rows, post_norm, config_.norm_epsilon, projected_.data(), threads);
    }
    add(residual, projected_.data(), rows, hidden, threads);
  };
  for (std::int64_t first = 0; first < rows_; first += kGroupRows) {
    const std::int64_t rows = std::min(kGroupRows, rows_ - first);
    float* residual = hidden_.data() + first * hidden;
    layer.o->multiply(attended_.data() + first * q_width, rows, projected_.data(), options);
    add_bias(projected_.data(), rows, layer.o_bias, threads);
    join(residual, rows, layer.attention_post_norm);
    rms_norm(residual, rows, layer.mlp_norm, config_.norm_epsilon, normed_.data(), threads);
    feed_forward_.run(layer, normed_.data(), rows, projected_.data(), options);
    join(residual, rows, layer.mlp_post_norm);
  }
}

void Decoder::head(std::span<const float> hidden, std::vector<float>& logits, const RunOptions& run, bool exact) {
  const auto rows = static_cast<std::int64_t>(hidden.size()) / config_.hidden_size;
  size_to(normed_, rows * config_.hidden_size);
  logits.resize(static_cast<std::size_t>(rows * config_.vocab_size));
  rms_norm(hidden.data(), rows, weights_.norm, config_.norm_epsilon, normed_.data(), run.threads);
  weights_.output_head().multiply(normed_.data(), rows, logits.data(), products(run, exact));
  if (config_.final_softcap != 0) {
    soft_cap(logits.data(), rows, config_.vocab_size, config_.final_softcap, run.threads);
  }
}

}  // namespace tessera::model
