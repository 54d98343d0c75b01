#include "model/weights.h"

#include <algorithm>

#include "core/error.h"

namespace tessera::model {

namespace {

class Loader {
 public:
  Loader(TensorSource& source, const ModelConfig& config) : source_(source), config_(config) {
    // Models that also read images keep the text part under another name.
    for (const std::string_view other : {"language_model.model.", "model.language_model."}) {
      if (source.has(std::string(other) + "embed_tokens.weight")) {
        root_ = other;
        if (other.starts_with("language_model.")) head_ = "language_model.lm_head.weight";
      }
    }
  }

  Weights load() {
    Weights weights;
    const std::int64_t hidden = config_.hidden_size;
    weights.embedding = matrix(root_ + "embed_tokens.weight", config_.vocab_size, hidden);
    for (std::int64_t i = 0; i < config_.layers; ++i) weights.layers.push_back(load_layer(i));
    weights.norm = norm(root_ + "norm.weight", hidden);
    std::vector<std::string> harmless;
    if (config_.tied_head) {
      harmless.push_back(head_);
    } else {
      weights.head = matrix(head_, config_.vocab_size, hidden);
    }
    if (root_ != root) {
      for (const char* part : {"vision_tower.", "multi_modal_projector."}) {
        harmless.emplace_back(part);
        harmless.push_back(std::string("model.") + part);
      }
    }
    source_.check_all_used(harmless);
    return weights;
  }

 private:
  std::unique_ptr<Matrix> matrix(const std::string& name, std::int64_t rows, std::int64_t columns) {
    return source_.matrix(name, 0, rows, rows, columns);
  }
  std::vector<float> bias(bool wanted, const std::string& name, std::int64_t size) {
    return wanted ? source_.vector(name, size) : std::vector<float>();
  }
  std::vector<float> norm(const std::string& name, std::int64_t size) {
    std::vector<float> weights = source_.vector(name, size);
    if (config_.norm_plus_one) {
      for (float& weight : weights) weight += 1;
    }
    return weights;
  }

  LayerWeights load_layer(std::int64_t index) {
    const std::string prefix = fmt::format("{}layers.{}.", root_, index);
    const std::int64_t hidden = config_.hidden_size;
    LayerWeights layer;
    layer.attention_norm = norm(prefix + "input_layernorm.weight", hidden);
    load_attention(prefix + "self_attn.", layer);
    if (config_.post_norms) {
      layer.attention_post_norm = norm(prefix + "post_attention_layernorm.weight", hidden);
      layer.mlp_norm = norm(prefix + "pre_feedforward_layernorm.weight", hidden);
      layer.mlp_post_norm = norm(prefix + "post_feedforward_layernorm.weight", hidden);
    } else {
      layer.mlp_norm = norm(prefix + "post_attention_layernorm.weight", hidden);
    }
    if (config_.layer(index).experts) {
      load_experts(prefix, layer);
    } else {
      layer.mlp = load_mlp(prefix + "mlp.");
    }
    return layer;
  }

  void load_attention(const std::string& prefix, LayerWeights& layer) {
    const std::int64_t hidden = config_.hidden_size;
    const std::int64_t q_rows = config_.q_heads * config_.head_dim;
    const std::int64_t kv_rows = config_.kv_heads * config_.head_dim;
    if (config_.fused_projections) {
      const std::string fused = prefix + "qkv_proj.weight";
      const std::int64_t all = q_rows + 2 * kv_rows;
      layer.q = source_.matrix(fused, 0, q_rows, all, hidden);
      layer.k = source_.matrix(fused, q_rows, kv_rows, all, hidden);
      layer.v = source_.matrix(fused, q_rows + kv_rows, kv_rows, all, hidden);
    } else {
      layer.q = matrix(prefix + "q_proj.weight", q_rows, hidden);
      layer.k = matrix(prefix + "k_proj.weight", kv_rows, hidden);
      layer.v = matrix(prefix + "v_proj.weight", kv_rows, hidden);
    }
    layer.q_bias = bias(config_.qkv_bias, prefix + "q_proj.bias", q_rows);
    layer.k_bias = bias(config_.qkv_bias, prefix + "k_proj.bias", kv_rows);
    layer.v_bias = bias(config_.qkv_bias, prefix + "v_proj.bias", kv_rows);
    layer.o = matrix(prefix + "o_proj.weight", hidden, q_rows);
    layer.o_bias = bias(config_.output_bias, prefix + "o_proj.bias", hidden);
    if (config_.qk_norm) {
      layer.q_norm = norm(prefix + "q_norm.weight", config_.head_dim);
      layer.k_norm = norm(prefix + "k_norm.weight", config_.head_dim);
    }
  }

  FeedForwardWeights load_mlp(const std::string& prefix) {
    const std::int64_t hidden = config_.hidden_size;
    const std::int64_t inner = config_.intermediate_size;
    FeedForwardWeights mlp;
    if (config_.fused_projections) {
      const std::string fused = prefix + "gate_up_proj.weight";
      mlp.gate = source_.matrix(fused, 0, inner, 2 * inner, hidden);
      mlp.up = source_.matrix(fused, inner, inner, 2 * inner, hidden);
    } else {
      mlp.gate = matrix(prefix + "gate_proj.weight", inner, hidden);
      mlp.up = matrix(prefix + "up_proj.weight", inner, hidden);
    }
    mlp.down = matrix(prefix + "down_proj.weight", hidden, inner);
    mlp.gate_bias = bias(config_.mlp_bias, prefix + "gate_proj.bias", inner);
    mlp.up_bias = bias(config_.mlp_bias, prefix + "up_proj.bias", inner);
    mlp.down_bias = bias(config_.mlp_bias, prefix + "down_proj.bias", hidden);
    return mlp;
  }

  /// Experts are matrices of their own, or one tensor for all with gate and up one above the other. Mixtral's files
  /// call everything something else.
  void load_experts(const std::string& prefix, LayerWeights& layer) {
    const std::int64_t hidden = config_.hidden_size;
    const std::int64_t inner = config_.experts.intermediate_size;
    const std::int64_t count = config_.experts.count;
    const bool mixtral = source_.has(prefix + "block_sparse_moe.gate.weight");
    const std::string block = prefix + (mixtral ? "block_sparse_moe." : "mlp.");
    layer.router = matrix(block + "gate.weight", count, hidden);
    const std::string fused = block + "experts.gate_up_proj";
    const bool one_tensor = source_.has(fused);
    for (std::int64_t i = 0; i < count; ++i) {
      FeedForwardWeights expert;
      if (one_tensor) {
        expert.gate = source_.matrix(fused, 2 * i * inner, inner, 2 * count * inner, hidden);
        expert.up = source_.matrix(fused, (2 * i + 1) * inner, inner, 2 * count * inner, hidden);
        expert.down = source_.matrix(block + "experts.down_proj", i * hidden, hidden, count * hidden, inner);
      } else {
        const std::string own = fmt::format("{}experts.{}.", block, i);
        expert.gate = matrix(own + (mixtral ? "w1" : "gate_proj") + ".weight", inner, hidden);
        expert.up = matrix(own + (mixtral ? "w3" : "up_proj") + ".weight", inner, hidden);
        expert.down = matrix(own + (mixtral ? "w2" : "down_proj") + ".weight", hidden, inner);
      }
      layer.experts.push_back(std::move(expert));
    }
  }

  static constexpr std::string_view root = "model.";
  TensorSource& source_;
  const ModelConfig& config_;
  std::string root_{root};
  std::string head_ = "lm_head.weight";
};

std::size_t bytes_of(const FeedForwardWeights& part) {
  std::size_t bytes = (part.gate_bias.size() + part.up_bias.size() + part.down_bias.size()) * sizeof(float);
  for (const Matrix* matrix : {part.gate.get(), part.up.get(), part.down.get()}) {
    if (matrix != nullptr) bytes += matrix->heap_bytes();
  }
  return bytes;
}

}  // namespace

std::size_t Weights::heap_bytes() const {
  std::size_t bytes =
      source->copied_bytes() + norm.size() * sizeof(float) + embedding->heap_bytes() + (head ? head->heap_bytes() : 0);
  for (const LayerWeights& layer : layers) {
    for (const Matrix* matrix : {layer.q.get(), layer.k.get(), layer.v.get(), layer.o.get(), layer.router.get()}) {
      if (matrix != nullptr) bytes += matrix->heap_bytes();
    }
    for (const std::vector<float>* vector :
         {&layer.attention_norm, &layer.q_bias, &layer.k_bias, &layer.v_bias, &layer.o_bias, &layer.q_norm,
          &layer.k_norm, &layer.attention_post_norm, &layer.mlp_norm, &layer.mlp_post_norm}) {
      bytes += vector->size() * sizeof(float);
    }
    bytes += bytes_of(layer.mlp);
    for (const FeedForwardWeights& expert : layer.experts) bytes += bytes_of(expert);
  }
  return bytes;
}

double Weights::decoded_bytes(std::int64_t chosen_experts) const {
  std::size_t always = output_head().stored_bytes();
  double experts = 0;
  const auto add = [](const FeedForwardWeights& part, auto& sum) {
    for (const Matrix* matrix : {part.gate.get(), part.up.get(), part.down.get()}) {
      if (matrix != nullptr) sum += matrix->stored_bytes();
    }
  };
  for (const LayerWeights& layer : layers) {
    for (const Matrix* matrix : {layer.q.get(), layer.k.get(), layer.v.get(), layer.o.get(), layer.router.get()}) {
      if (matrix != nullptr) always += matrix->stored_bytes();
    }
    add(layer.mlp, always);
    std::size_t all = 0;
    for (const FeedForwardWeights& expert : layer.experts) add(expert, all);
    if (all > 0) {
      experts +=
          static_cast<double>(all) * static_cast<double>(chosen_experts) / static_cast<double>(layer.experts.size());
    }
  }
  return static_cast<double>(always) + experts;
}

Weights load_weights(std::unique_ptr<TensorSource> source, const ModelConfig& config) {
  Weights weights = Loader(*source, config).load();
  weights.source = std::move(source);
  return weights;
}

}  // namespace tessera::model
