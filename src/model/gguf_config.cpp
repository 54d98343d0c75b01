#include "model/gguf_config.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "core/error.h"

namespace tessera::model {

namespace {

constexpr std::int64_t kMostLayers = 4096;

/// What an architecture of GGUF files means. llama.cpp rotates neighbours for some and stores their rows in that order.
struct GgufArchitecture {
  std::string_view name;  ///< general.architecture
  std::string_view ours;  ///< model_type
  bool interleaved = false;
};
constexpr std::array kArchitectures{
    GgufArchitecture{"llama", "llama", true},     GgufArchitecture{"qwen2", "qwen2"},
    GgufArchitecture{"qwen3", "qwen3"},           GgufArchitecture{"qwen3moe", "qwen3_moe"},
    GgufArchitecture{"gemma", "gemma"},           GgufArchitecture{"gemma2", "gemma2"},
    GgufArchitecture{"gemma3", "gemma3_text"},    GgufArchitecture{"phi3", "phi3"},
    GgufArchitecture{"smollm3", "smollm3", true},
};

class Reader {
 public:
  explicit Reader(const GgufFile& file) : file_(file) {}

  ModelConfig read() {
    find_architecture();
    read_sizes();
    read_features();
    config_.rope = read_rope();
    read_tokens();
    validate(config_, file_.name());
    return std::move(config_);
  }

 private:
  std::string key(std::string_view name) const { return fmt::format("{}.{}", architecture_.name, name); }
  std::int64_t size(std::string_view name) const { return file_.get<std::int64_t>(key(name)); }
  std::int64_t size_or(std::string_view name, std::int64_t fallback) const {
    return file_.get_or<std::int64_t>(key(name), fallback);
  }
  double number_or(std::string_view name, double fallback) const { return file_.get_or<double>(key(name), fallback); }
  bool has_tensor(std::string_view name) const { return file_.tensors().contains(name); }

  void find_architecture() {
    const auto name = file_.get<std::string>("general.architecture");
    const auto found = std::find_if(kArchitectures.begin(), kArchitectures.end(),
                                    [&](const GgufArchitecture& known) { return known.name == name; });
    require(found != kArchitectures.end(), "{}: architecture '{}' is not supported; supported: {}", file_.name(),
            name.substr(0, 60), gguf_architecture_names());
    architecture_ = *found;
    config_.architecture = architecture_.ours;
  }

  void read_sizes() {
    config_.vocab_size = file_.tensor("token_embd.weight").shape.front();
    config_.hidden_size = size("embedding_length");
    config_.layers = size("block_count");
    require(config_.layers >= 1 && config_.layers <= kMostLayers, "{}: '{}' is {}; expected 1 to {}", file_.name(),
            key("block_count"), config_.layers, kMostLayers);
    config_.layer_kinds.resize(static_cast<std::size_t>(config_.layers));
    config_.intermediate_size = size("feed_forward_length");
    config_.q_heads = size("attention.head_count");
    config_.kv_heads = size_or("attention.head_count_kv", config_.q_heads);
    require(config_.q_heads >= 1, "{}: '{}' is {}; expected at least 1", file_.name(), key("attention.head_count"),
            config_.q_heads);
    config_.head_dim = size_or("attention.key_length", config_.hidden_size / config_.q_heads);
    const std::int64_t values = size_or("attention.value_length", config_.head_dim);
    require(values == config_.head_dim, "{}: '{}' is {}; expected that of keys, {}", file_.name(),
            key("attention.value_length"), values, config_.head_dim);
    config_.max_positions = size("context_length");
    config_.norm_epsilon = file_.get<double>(key("attention.layer_norm_rms_epsilon"));
    config_.tied_head = !has_tensor("output.weight");
  }

  void read_features() {
    config_.qkv_bias = has_tensor("blk.0.attn_q.bias");
    config_.output_bias = has_tensor("blk.0.attn_output.bias");
    config_.mlp_bias = has_tensor("blk.0.ffn_gate.bias");
    config_.qk_norm = has_tensor("blk.0.attn_q_norm.weight");
    config_.fused_projections = has_tensor("blk.0.attn_qkv.weight");
    const std::int64_t window = size_or("attention.sliding_window", 0);
    const std::int64_t pattern =
        size_or("attention.sliding_window_pattern", config_.architecture == "gemma3_text" ? 6 : 2);
    require(pattern >= 1, "{}: '{}' is {}; expected at least 1", file_.name(), key("attention.sliding_window_pattern"),
            pattern);
    const bool gemma = config_.architecture.starts_with("gemma");
    const bool alternates = gemma && config_.architecture != "gemma";
    for (std::int64_t i = 0; i < config_.layers; ++i) {
      LayerConfig& layer = config_.layer_kinds[static_cast<std::size_t>(i)];
      if (!alternates || (i + 1) % pattern != 0) layer.window = window;
      if (config_.architecture == "gemma3_text" && layer.window > 0) layer.rope = LayerRope::local;
      if (config_.architecture == "smollm3" && (i + 1) % 4 == 0) layer.rope = LayerRope::none;
      layer.experts = has_tensor(fmt::format("blk.{}.ffn_gate_inp.weight", i));
    }
    // Norms of Gemma are stored with the 1 added.
    if (gemma) {
      config_.activation = Activation::gelu_tanh;
      config_.embedding_scale = std::sqrt(static_cast<double>(config_.hidden_size));
    }
    if (alternates) read_later_gemma();
    if (const std::int64_t experts = size_or("expert_count", 0); experts > 0) {
      config_.experts = {.count = experts,
                         .chosen = size("expert_used_count"),
                         .intermediate_size = size_or("expert_feed_forward_length", config_.intermediate_size),
                         .normalise = true};
      if (architecture_.name == "llama") config_.architecture = "mixtral";
    }
  }

  void read_later_gemma() {
    config_.post_norms = true;
    // The file does not say; only the 27B models scale by something else.
    const bool largest = config_.layers == (config_.architecture == "gemma2" ? 46 : 62);
    config_.attention_scale =
        1 / std::sqrt(static_cast<double>(largest ? config_.hidden_size / config_.q_heads : config_.head_dim));
    if (config_.architecture == "gemma2") {
      config_.attention_softcap = number_or("attn_logit_softcapping", 50);
      config_.final_softcap = number_or("final_logit_softcapping", 30);
    } else {
      config_.local_rope.theta = number_or("rope.freq_base_swa", 10000);
    }
  }

  std::vector<double> factors(std::string_view tensor_name, std::int64_t expected) const {
    const GgufTensor& tensor = file_.tensor(tensor_name);
    require(tensor.type == GgmlType::f32 && tensor.elements() == expected,
            "{}: tensor '{}' has {} numbers of type {}; expected {} of F32", file_.name(), tensor_name,
            tensor.elements(), name_of(tensor.type), expected);
    std::vector<float> numbers(static_cast<std::size_t>(expected));
    dequantise(tensor.type, file_.bytes(tensor).data(), expected, numbers.data());
    return {numbers.begin(), numbers.end()};
  }

  RopeConfig read_rope() {
    RopeConfig rope;
    rope.theta = number_or("rope.freq_base", 10000);
    rope.interleaved = architecture_.interleaved;
    const std::int64_t dims = size_or("rope.dimension_count", config_.head_dim);
    require(dims >= 2 && dims <= config_.head_dim && dims % 2 == 0, "{}: '{}' is {}; expected an even number up to {}",
            file_.name(), key("rope.dimension_count"), dims, config_.head_dim);
    rope.dims = dims == config_.head_dim ? 0 : dims;
    rope.original_positions = size_or("rope.scaling.original_context_length", config_.max_positions);
    const auto type = file_.get_or<std::string>(key("rope.scaling.type"), "none");
    rope.factor = number_or("rope.scaling.factor", 1);
    rope.attention_factor = number_or("rope.scaling.attn_factor", 1);
    if (has_tensor("rope_factors_long.weight")) {
      rope.scaling = RopeScaling::longrope;
      rope.short_factors = factors("rope_factors_short.weight", dims / 2);
      rope.long_factors = factors("rope_factors_long.weight", dims / 2);
    } else if (has_tensor("rope_freqs.weight")) {
      // Divisors of the frequencies, for sequences of any length: how files of Llama 3.1 put their scaling.
      rope.scaling = RopeScaling::longrope;
      rope.short_factors = rope.long_factors = factors("rope_freqs.weight", dims / 2);
    } else if (type == "linear") {
      rope.scaling = RopeScaling::linear;
    } else if (type == "yarn") {
      rope.scaling = RopeScaling::yarn;
      rope.attention_factor *= yarn_attention_factor(rope.factor);
      rope.beta_fast = number_or("rope.scaling.yarn_beta_fast", 32);
      rope.beta_slow = number_or("rope.scaling.yarn_beta_slow", 1);
    } else {
      require(type == "none",
              "{}: '{}' is '{}', which is not supported; supported: none, linear, yarn, longrope with "
              "its factors",
              file_.name(), key("rope.scaling.type"), type.substr(0, 60));
      rope.factor = 1;
    }
    return rope;
  }

  void read_tokens() {
    const auto token = [&](std::string_view name) -> std::optional<std::int32_t> {
      const auto id = file_.get_optional<std::int64_t>(fmt::format("tokenizer.ggml.{}", name));
      if (!id || *id < 0 || *id >= config_.vocab_size) return std::nullopt;
      return static_cast<std::int32_t>(*id);
    };
    config_.bos_token = token("bos_token_id");
    for (const std::string_view name : {"eos_token_id", "eot_token_id", "eom_token_id"}) {
      const auto id = token(name);
      auto& ends = config_.eos_tokens;
      if (id && std::find(ends.begin(), ends.end(), *id) == ends.end()) ends.push_back(*id);
    }
  }

  const GgufFile& file_;
  GgufArchitecture architecture_;
  ModelConfig config_;
};

}  // namespace

std::string gguf_architecture_names() {
  std::string names;
  for (const GgufArchitecture& known : kArchitectures) {
    names += fmt::format("{}{}", names.empty() ? "" : ", ", known.name);
  }
  return names;
}

ModelConfig read_config(const GgufFile& file) {
  return Reader(file).read();
}

}  // namespace tessera::model
