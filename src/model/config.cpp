#include "model/config.h"

#include <array>
#include <cmath>

#include "model/architectures.h"

namespace tessera {

namespace {

struct ActivationName {
  std::string_view name;
  Activation activation;
};
/// Those that write configurations know several names for one function.
constexpr std::array kActivations{
    ActivationName{"silu", Activation::silu},          ActivationName{"swish", Activation::silu},
    ActivationName{"gelu", Activation::gelu},          ActivationName{"gelu_pytorch_tanh", Activation::gelu_tanh},
    ActivationName{"gelu_new", Activation::gelu_tanh}, ActivationName{"gelu_fast", Activation::gelu_tanh}};

/// Checks of numbers that become sizes and factors.
class Checks {
 public:
  explicit Checks(std::string_view name) : name_(name) {}
  void size(std::string_view field, std::int64_t value, std::int64_t largest, std::int64_t smallest = 1) const {
    require(value >= smallest && value <= largest, "{}: '{}' is {}; expected {} to {}", name_, field, value, smallest,
            largest);
  }
  void positive(std::string_view field, double value) const {
    require(std::isfinite(value) && value > 0, "{}: '{}' is {}; expected a positive number", name_, field, value);
  }
  void not_negative(std::string_view field, double value) const {
    require(std::isfinite(value) && value >= 0, "{}: '{}' is {}; expected 0 (off) or a positive number", name_, field,
            value);
  }
  std::string_view name() const { return name_; }

 private:
  std::string_view name_;
};

void check_factors(const Checks& checks, std::string_view field, const std::vector<double>& factors,
                   std::int64_t expected) {
  require(std::ssize(factors) == expected, "{}: '{}' has {} entries; expected {}", checks.name(), field, factors.size(),
          expected);
  for (const double factor : factors) checks.positive(field, factor);
}

void check_rope(const Checks& checks, const RopeConfig& rope, const ModelConfig& config) {
  checks.positive("rope_theta", rope.theta);
  const std::int64_t dims = rope.dims == 0 ? config.head_dim : rope.dims;
  require(dims >= 2 && dims <= config.head_dim && dims % 2 == 0,
          "{}: {} rotated dimensions; expected an even number of at most head_dim {}", checks.name(), dims,
          config.head_dim);
  if (rope.scaling == RopeScaling::none) return;
  checks.positive("factor", rope.factor);
  checks.positive("attention_factor", rope.attention_factor);
  if (rope.scaling != RopeScaling::linear)
    checks.size("original_positions", rope.original_positions, model::kMostPositions);
  switch (rope.scaling) {
    case RopeScaling::dynamic:
      require(rope.factor >= 1, "{}: rope 'factor' is {}; expected at least 1", checks.name(), rope.factor);
      require(dims > 2, "{}: dynamic rope scaling needs more than 2 rotated dimensions", checks.name());
      break;
    case RopeScaling::yarn:
      checks.positive("beta_fast", rope.beta_fast);
      checks.positive("beta_slow", rope.beta_slow);
      require(rope.theta > 1, "{}: 'rope_theta' is {}; yarn expects more than 1", checks.name(), rope.theta);
      break;
    case RopeScaling::llama3:
      checks.positive("low_freq_factor", rope.low_frequency_factor);
      require(std::isfinite(rope.high_frequency_factor) && rope.high_frequency_factor > rope.low_frequency_factor,
              "{}: 'high_freq_factor' is {}; expected more than low_freq_factor {}", checks.name(),
              rope.high_frequency_factor, rope.low_frequency_factor);
      break;
    case RopeScaling::longrope:
      check_factors(checks, "short_factor", rope.short_factors, dims / 2);
      check_factors(checks, "long_factor", rope.long_factors, dims / 2);
      break;
    default:
      break;
  }
}

}  // namespace

std::string_view name_of(Activation activation) {
  if (activation == Activation::gelu_tanh) return "gelu_pytorch_tanh";
  return activation == Activation::gelu ? "gelu" : "silu";
}

void validate(const ModelConfig& config, std::string_view name) {
  using namespace model;
  const Checks checks(name);
  checks.size("vocab_size", config.vocab_size, kLargestSize);
  checks.size("hidden_size", config.hidden_size, kLargestSize);
  checks.size("intermediate_size", config.intermediate_size, kLargestSize);
  checks.size("num_hidden_layers", config.layers, kMostLayers);
  checks.size("num_attention_heads", config.q_heads, kMostHeads);
  checks.size("num_key_value_heads", config.kv_heads, kMostHeads);
  checks.size("max_position_embeddings", config.max_positions, kMostPositions);
  checks.size("head_dim", config.head_dim, kMostHeads);
  require(config.q_heads % config.kv_heads == 0, "{}: num_key_value_heads {} does not divide num_attention_heads {}",
          name, config.kv_heads, config.q_heads);
  require(config.head_dim % 2 == 0, "{}: head_dim is {}; rotary embedding needs an even number", name, config.head_dim);
  // Rows of a matrix are counted in 64 bits, but heads times dimensions have no meaning beyond this.
  checks.size("num_attention_heads times head_dim", config.q_heads * config.head_dim, kLargestSize);
  checks.positive("rms_norm_eps", config.norm_epsilon);
  checks.positive("embedding_scale", config.embedding_scale);
  checks.not_negative("attention_scale", config.attention_scale);
  checks.not_negative("attn_logit_softcapping", config.attention_softcap);
  checks.not_negative("final_logit_softcapping", config.final_softcap);
  require(config.layer_kinds.empty() || std::ssize(config.layer_kinds) == config.layers,
          "{}: {} kinds of layers; expected one per layer, {}", name, config.layer_kinds.size(), config.layers);
  bool experts = false;
  bool local = false;
  for (const LayerConfig& layer : config.layer_kinds) {
    checks.size("sliding_window", layer.window, kMostPositions, 0);
    experts = experts || layer.experts;
    local = local || layer.rope == LayerRope::local;
  }
  check_rope(checks, config.rope, config);
  if (local) check_rope(checks, config.local_rope, config);
  if (experts) {
    checks.size("num_experts", config.experts.count, kMostExperts);
    checks.size("num_experts_per_tok", config.experts.chosen, config.experts.count);
    checks.size("moe_intermediate_size", config.experts.intermediate_size, kLargestSize);
  }
  const auto check_token = [&](std::string_view key, std::int64_t token) {
    require(token >= 0 && token < config.vocab_size, "{}: '{}' is {}; expected an id below vocab_size {}", name, key,
            token, config.vocab_size);
  };
  if (config.bos_token) check_token("bos_token_id", *config.bos_token);
  for (const std::int32_t token : config.eos_tokens) check_token("eos_token_id", token);
}

namespace model {

namespace {

Activation read_activation(const ConfigReader& reader, std::string_view fallback) {
  const std::string_view key = reader.find("hidden_activation") != nullptr ? "hidden_activation" : "hidden_act";
  const auto name = reader.value_or(key, std::string(fallback));
  for (const ActivationName& known : kActivations) {
    if (known.name == name) return known.activation;
  }
  fail("{}: {} '{}' is not supported; supported: silu, gelu, gelu_pytorch_tanh", reader.name(), key, name);
}

std::int32_t checked_token(const ConfigReader& reader, std::string_view key, std::int64_t token,
                           std::int64_t vocab_size) {
  require(token >= 0 && token < vocab_size, "{}: '{}' is {}; expected an id below vocab_size {}", reader.name(), key,
          token, vocab_size);
  return static_cast<std::int32_t>(token);
}

void read_special_tokens(const ConfigReader& reader, ModelConfig& config) {
  if (reader.find("bos_token_id") != nullptr) {
    config.bos_token =
        checked_token(reader, "bos_token_id", reader.value<std::int64_t>("bos_token_id"), config.vocab_size);
  }
  const Json* eos = reader.find("eos_token_id");
  if (eos == nullptr) return;
  const auto tokens = eos->is_array() ? reader.value<std::vector<std::int64_t>>("eos_token_id")
                                      : std::vector{reader.value<std::int64_t>("eos_token_id")};
  for (const std::int64_t token : tokens) {
    config.eos_tokens.push_back(checked_token(reader, "eos_token_id", token, config.vocab_size));
  }
}

std::int64_t read_head_dim(const ConfigReader& reader, const Architecture& architecture, const ModelConfig& config) {
  if (reader.find("head_dim") != nullptr) return reader.size("head_dim", kMostHeads);
  if (architecture.head_dim > 0) return architecture.head_dim;
  require(config.hidden_size % config.q_heads == 0,
          "{}: num_attention_heads {} does not divide hidden_size {} and 'head_dim' is missing", reader.name(),
          config.q_heads, config.hidden_size);
  return config.hidden_size / config.q_heads;
}

}  // namespace

ModelConfig read_config(const Json& json, std::string_view name) {
  const Json text = text_config(json, name);
  const ConfigReader reader(text, std::string(name));
  const Architecture& architecture = find_architecture(reader);
  require(reader.find("quantization_config") == nullptr,
          "{}: 'quantization_config' is set, which is not supported; expected null", name);

  ModelConfig config;
  config.architecture = architecture.info.name;
  config.vocab_size = reader.size("vocab_size", kLargestSize);
  config.hidden_size = reader.size("hidden_size", kLargestSize);
  config.intermediate_size = reader.size("intermediate_size", kLargestSize);
  config.layers = reader.size("num_hidden_layers", kMostLayers);
  config.q_heads = reader.size("num_attention_heads", kMostHeads);
  config.kv_heads = reader.size_or("num_key_value_heads", config.q_heads, kMostHeads);
  config.head_dim = read_head_dim(reader, architecture, config);
  require(config.head_dim % 2 == 0, "{}: head_dim is {}; rotary embedding needs an even number", name, config.head_dim);
  config.max_positions = reader.size("max_position_embeddings", kMostPositions);
  config.norm_epsilon = reader.positive("rms_norm_eps");
  config.activation = read_activation(reader, architecture.activation);
  config.tied_head = reader.value_or("tie_word_embeddings", architecture.tied_head);
  config.layer_kinds.resize(static_cast<std::size_t>(config.layers));
  architecture.read(reader, config);
  read_rope(reader, architecture.rope_theta, config);
  read_special_tokens(reader, config);
  validate(config, name);
  return config;
}

}  // namespace model

}  // namespace tessera
