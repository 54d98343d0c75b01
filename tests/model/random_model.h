// Tiny random models on disk, and their forward pass written plainly in float64.
#pragma once

#include <cmath>
#include <cstdint>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "core/convert.h"
#include "io/json.h"
#include "io/safetensors.h"
#include "io/temporary_folder.h"
#include "tessera/model.h"

namespace tessera::testing {

struct RandomModelShape {
  std::int64_t vocab = 260;
  std::int64_t hidden = 24;
  std::int64_t inner = 40;
  std::int64_t layers = 2;
  std::int64_t q_heads = 4;
  std::int64_t kv_heads = 2;
  std::int64_t head_dim = 16;
  bool tied = false;
  DType storage = DType::f32;
  std::uint64_t seed = 7;
  std::int64_t max_positions = 512;
};

/// The tensors of such a model as float32 (already rounded to the storage type).
class RandomModel {
 public:
  explicit RandomModel(const RandomModelShape& shape) : shape_(shape), generator_(shape.seed) {
    const std::int64_t q_width = shape.q_heads * shape.head_dim;
    const std::int64_t kv_width = shape.kv_heads * shape.head_dim;
    add("model.embed_tokens.weight", {shape.vocab, shape.hidden}, 0, 1);
    for (std::int64_t i = 0; i < shape.layers; ++i) {
      const std::string prefix = "model.layers." + std::to_string(i) + ".";
      add(prefix + "input_layernorm.weight", {shape.hidden}, 1, 0.3);
      add(prefix + "self_attn.q_proj.weight", {q_width, shape.hidden}, 0, 0.4);
      add(prefix + "self_attn.k_proj.weight", {kv_width, shape.hidden}, 0, 0.4);
      add(prefix + "self_attn.v_proj.weight", {kv_width, shape.hidden}, 0, 0.4);
      add(prefix + "self_attn.o_proj.weight", {shape.hidden, q_width}, 0, 0.2);
      add(prefix + "post_attention_layernorm.weight", {shape.hidden}, 1, 0.3);
      add(prefix + "mlp.gate_proj.weight", {shape.inner, shape.hidden}, 0, 0.3);
      add(prefix + "mlp.up_proj.weight", {shape.inner, shape.hidden}, 0, 0.3);
      add(prefix + "mlp.down_proj.weight", {shape.hidden, shape.inner}, 0, 0.3);
    }
    add("model.norm.weight", {shape.hidden}, 1, 0.3);
    if (!shape.tied) add("lm_head.weight", {shape.vocab, shape.hidden}, 0, 0.3);
  }

  Json config() const {
    return {{"model_type", "llama"},
            {"architectures", {"LlamaForCausalLM"}},
            {"vocab_size", shape_.vocab},
            {"hidden_size", shape_.hidden},
            {"intermediate_size", shape_.inner},
            {"num_hidden_layers", shape_.layers},
            {"num_attention_heads", shape_.q_heads},
            {"num_key_value_heads", shape_.kv_heads},
            {"head_dim", shape_.head_dim},
            {"max_position_embeddings", shape_.max_positions},
            {"rms_norm_eps", 1e-5},
            {"rope_theta", 10000.0},
            {"tie_word_embeddings", shape_.tied}};
  }

  /// config.json and model.safetensors; without tokenizer.json ids are bytes.
  void write(const TemporaryFolder& folder) const {
    folder.file("config.json", config().dump());
    write_tensors(folder / "model.safetensors", [](const std::string&) { return true; });
  }

  /// The tensors whose names `chosen` accepts.
  template <class Chosen>
  std::vector<std::string> write_tensors(const std::filesystem::path& path, const Chosen& chosen) const {
    std::vector<std::vector<std::byte>> bytes;
    std::vector<NamedTensor> tensors;
    std::vector<std::string> names;
    bytes.reserve(tensors_.size());
    for (const auto& [name, tensor] : tensors_) {
      if (!chosen(name)) continue;
      bytes.emplace_back(tensor.values.size() * size_of(shape_.storage));
      from_float(tensor.values.data(), static_cast<std::int64_t>(tensor.values.size()), shape_.storage,
                 bytes.back().data());
      tensors.push_back({name, shape_.storage, tensor.shape, bytes.back()});
      names.push_back(name);
    }
    write_safetensors(path, tensors);
    return names;
  }

  /// Logits [tokens][vocab] in float64, term by term from the definitions.
  std::vector<std::vector<double>> forward(const std::vector<std::int32_t>& tokens) const;

 private:
  using Row = std::vector<double>;
  struct Tensor {
    std::vector<std::int64_t> shape;
    std::vector<float> values;
  };

  void add(const std::string& name, std::vector<std::int64_t> shape, double mean, double spread) {
    Tensor tensor{std::move(shape), {}};
    std::int64_t elements = 1;
    for (const std::int64_t size : tensor.shape) elements *= size;
    tensor.values.resize(static_cast<std::size_t>(elements));
    for (float& value : tensor.values) {
      const double uniform = static_cast<double>(generator_() >> 11) * 0x1p-52 - 1;  // [-1, 1)
      std::array<std::byte, 4> stored{};
      store_from_float(stored.data(), shape_.storage, 0, static_cast<float>(mean + spread * uniform));
      value = load_as_float(stored.data(), shape_.storage, 0);
    }
    tensors_.emplace(name, std::move(tensor));
  }

  Row times(const std::string& name, const Row& x) const {
    const Tensor& weight = tensors_.at(name);
    Row y(static_cast<std::size_t>(weight.shape[0]));
    for (std::size_t o = 0; o < y.size(); ++o) {
      for (std::size_t i = 0; i < x.size(); ++i) y[o] += static_cast<double>(weight.values[o * x.size() + i]) * x[i];
    }
    return y;
  }
  Row norm(const std::string& name, const Row& x) const {
    double squares = 0;
    for (const double value : x) squares += value * value;
    const double scale = 1 / std::sqrt(squares / static_cast<double>(x.size()) + 1e-5);
    Row y(x.size());
    for (std::size_t i = 0; i < x.size(); ++i) y[i] = x[i] * scale * static_cast<double>(tensors_.at(name).values[i]);
    return y;
  }
  /// Complex rotation of (x[i], x[i + D/2]) of each head by position * 10000^(-2i/D).
  void rotate(Row& x, std::size_t position) const {
    const auto dim = static_cast<std::size_t>(shape_.head_dim);
    for (std::size_t head = 0; head < x.size() / dim; ++head) {
      for (std::size_t i = 0; i < dim / 2; ++i) {
        const double angle = static_cast<double>(position) *
                             std::exp(-std::log(10000.0) * 2 * static_cast<double>(i) / static_cast<double>(dim));
        double& a = x[head * dim + i];
        double& b = x[head * dim + i + dim / 2];
        const double low = a * std::cos(angle) - b * std::sin(angle);
        b = a * std::sin(angle) + b * std::cos(angle);
        a = low;
      }
    }
  }

  RandomModelShape shape_;
  std::mt19937_64 generator_;
  std::map<std::string, Tensor> tensors_;
};

inline std::vector<std::vector<double>> RandomModel::forward(const std::vector<std::int32_t>& tokens) const {
  const auto hidden = static_cast<std::size_t>(shape_.hidden);
  const auto dim = static_cast<std::size_t>(shape_.head_dim);
  const auto heads = static_cast<std::size_t>(shape_.q_heads);
  const std::size_t group = heads / static_cast<std::size_t>(shape_.kv_heads);
  std::vector<Row> x;
  for (const std::int32_t token : tokens) {
    const float* row =
        tensors_.at("model.embed_tokens.weight").values.data() + static_cast<std::size_t>(token) * hidden;
    x.emplace_back(row, row + hidden);
  }
  for (std::int64_t layer = 0; layer < shape_.layers; ++layer) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".";
    std::vector<Row> keys;
    std::vector<Row> values;
    for (std::size_t t = 0; t < x.size(); ++t) {
      const Row normed = norm(prefix + "input_layernorm.weight", x[t]);
      Row q = times(prefix + "self_attn.q_proj.weight", normed);
      keys.push_back(times(prefix + "self_attn.k_proj.weight", normed));
      values.push_back(times(prefix + "self_attn.v_proj.weight", normed));
      rotate(q, t);
      rotate(keys.back(), t);
      Row attended(heads * dim);
      for (std::size_t head = 0; head < heads; ++head) {
        const std::size_t kv = head / group;
        Row weights;
        double sum = 0;
        for (std::size_t key = 0; key <= t; ++key) {
          double score = 0;
          for (std::size_t i = 0; i < dim; ++i) score += q[head * dim + i] * keys[key][kv * dim + i];
          weights.push_back(std::exp(score / std::sqrt(static_cast<double>(dim))));
          sum += weights.back();
        }
        for (std::size_t key = 0; key <= t; ++key) {
          for (std::size_t i = 0; i < dim; ++i) {
            attended[head * dim + i] += weights[key] / sum * values[key][kv * dim + i];
          }
        }
      }
      const Row projected = times(prefix + "self_attn.o_proj.weight", attended);
      for (std::size_t i = 0; i < hidden; ++i) x[t][i] += projected[i];
      const Row mlp = norm(prefix + "post_attention_layernorm.weight", x[t]);
      Row gate = times(prefix + "mlp.gate_proj.weight", mlp);
      const Row up = times(prefix + "mlp.up_proj.weight", mlp);
      for (std::size_t i = 0; i < gate.size(); ++i) gate[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
      const Row down = times(prefix + "mlp.down_proj.weight", gate);
      for (std::size_t i = 0; i < hidden; ++i) x[t][i] += down[i];
    }
  }
  std::vector<Row> logits;
  logits.reserve(x.size());
  for (const Row& row : x) {
    logits.push_back(
        times(shape_.tied ? "model.embed_tokens.weight" : "lm_head.weight", norm("model.norm.weight", row)));
  }
  return logits;
}

/// Token ids below `vocab` from a seed.
inline std::vector<std::int32_t> random_tokens(std::int64_t count, std::int64_t vocab, std::uint64_t seed) {
  std::mt19937_64 generator(seed);
  std::vector<std::int32_t> tokens(static_cast<std::size_t>(count));
  for (std::int32_t& token : tokens) {
    token = static_cast<std::int32_t>(generator() % static_cast<std::uint64_t>(vocab));
  }
  return tokens;
}

}  // namespace tessera::testing
