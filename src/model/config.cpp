#include "model/config.h"

#include <cmath>

#include "core/error.h"

namespace tessera::model {

namespace {

// Far above every model there is; products of two stay far below 2^63.
constexpr std::int64_t kLargestSize = std::int64_t{1} << 26;
constexpr std::int64_t kMostLayers = 4096;
constexpr std::int64_t kMostPositions = std::int64_t{1} << 31;

class Reader {
 public:
  Reader(const Json& json, std::string_view name) : json_(json), name_(name) {}

  std::int64_t size(std::string_view key, std::int64_t largest) const {
    return checked(key, get<std::int64_t>(json_, key, name_), largest);
  }
  std::int64_t size_or(std::string_view key, std::int64_t fallback, std::int64_t largest) const {
    return checked(key, get_or<std::int64_t>(json_, key, name_, fallback), largest);
  }
  template <class T>
  T or_default(std::string_view key, T fallback) const {
    return get_or<T>(json_, key, name_, std::move(fallback));
  }
  double positive(std::string_view key, double value) const {
    require(std::isfinite(value) && value > 0, "{}: '{}' is {}; expected a positive number", name_, key, value);
    return value;
  }
  const Json* find(std::string_view key) const {
    const auto found = json_.find(key);
    return found == json_.end() || found->is_null() ? nullptr : &*found;
  }
  const Json& json() const { return json_; }
  std::string_view name() const { return name_; }

 private:
  std::int64_t checked(std::string_view key, std::int64_t value, std::int64_t largest) const {
    require(value >= 1 && value <= largest, "{}: '{}' is {}; expected 1 to {}", name_, key, value, largest);
    return value;
  }

  const Json& json_;
  std::string_view name_;
};

void check_architecture(const Reader& reader) {
  constexpr std::string_view supported = "supported: model_type 'llama' (LlamaForCausalLM)";
  const auto type = get<std::string>(reader.json(), "model_type", reader.name());
  require(type == "llama", "{}: model_type '{}' is not supported; {}", reader.name(), type, supported);
  for (const auto& architecture : reader.or_default<std::vector<std::string>>("architectures", {})) {
    require(architecture == "LlamaForCausalLM", "{}: architecture '{}' is not supported; {}", reader.name(),
            architecture, supported);
  }
}

/// Keys that are fine while they are absent, null or false.
void check_absent(const Reader& reader) {
  for (const std::string_view key : {"attention_bias", "mlp_bias"}) {
    require(!reader.or_default<bool>(key, false), "{}: '{}' is true, which is not supported; expected false",
            reader.name(), key);
  }
  for (const std::string_view key : {"quantization_config", "sliding_window"}) {
    require(reader.find(key) == nullptr, "{}: '{}' is set, which is not supported; expected null", reader.name(), key);
  }
  const auto activation = reader.or_default<std::string>("hidden_act", "silu");
  require(activation == "silu" || activation == "swish", "{}: hidden_act '{}' is not supported; supported: silu",
          reader.name(), activation);
}

/// Both spellings: `rope_scaling` beside `rope_theta`, and the newer `rope_parameters` that holds both.
double read_rope_theta(const Reader& reader) {
  double theta = reader.or_default<double>("rope_theta", 10000.0);
  double rotated = reader.or_default<double>("partial_rotary_factor", 1.0);
  for (const std::string_view key : {"rope_scaling", "rope_parameters"}) {
    const Json* rope = reader.find(key);
    if (rope == nullptr) continue;
    const std::string where = fmt::format("{}: '{}'", reader.name(), key);
    const auto older = get_or<std::string>(*rope, "type", where, "default");
    const auto type = get_or<std::string>(*rope, "rope_type", where, older);
    require(type == "default" || type == "none", "{} has type '{}', which is not supported; supported: default, none",
            where, type);
    theta = get_or<double>(*rope, "rope_theta", where, theta);
    rotated = get_or<double>(*rope, "partial_rotary_factor", where, rotated);
  }
  require(rotated == 1.0, "{}: partial_rotary_factor {} is not supported; supported: 1", reader.name(), rotated);
  return reader.positive("rope_theta", theta);
}

std::int32_t checked_token(const Reader& reader, std::string_view key, std::int64_t token, std::int64_t vocab_size) {
  require(token >= 0 && token < vocab_size, "{}: '{}' is {}; expected an id below vocab_size {}", reader.name(), key,
          token, vocab_size);
  return static_cast<std::int32_t>(token);
}

void read_special_tokens(const Reader& reader, ModelConfig& config) {
  if (const auto bos = get_optional<std::int64_t>(reader.json(), "bos_token_id", reader.name())) {
    config.bos_token = checked_token(reader, "bos_token_id", *bos, config.vocab_size);
  }
  const Json* eos = reader.find("eos_token_id");
  if (eos == nullptr) return;
  const auto tokens = eos->is_array() ? get<std::vector<std::int64_t>>(reader.json(), "eos_token_id", reader.name())
                                      : std::vector{get<std::int64_t>(reader.json(), "eos_token_id", reader.name())};
  for (const std::int64_t token : tokens) {
    config.eos_tokens.push_back(checked_token(reader, "eos_token_id", token, config.vocab_size));
  }
}

}  // namespace

ModelConfig read_config(const Json& json, std::string_view name) {
  require(json.is_object(), "{}: expected a JSON object", name);
  const Reader reader(json, name);
  check_architecture(reader);
  check_absent(reader);

  ModelConfig config;
  config.vocab_size = reader.size("vocab_size", kLargestSize);
  config.hidden_size = reader.size("hidden_size", kLargestSize);
  config.intermediate_size = reader.size("intermediate_size", kLargestSize);
  config.layers = reader.size("num_hidden_layers", kMostLayers);
  config.q_heads = reader.size("num_attention_heads", 65536);
  config.kv_heads = reader.size_or("num_key_value_heads", config.q_heads, 65536);
  require(config.q_heads % config.kv_heads == 0, "{}: num_key_value_heads {} does not divide num_attention_heads {}",
          name, config.kv_heads, config.q_heads);
  if (reader.find("head_dim") == nullptr) {
    require(config.hidden_size % config.q_heads == 0,
            "{}: num_attention_heads {} does not divide hidden_size {} and 'head_dim' is missing", name, config.q_heads,
            config.hidden_size);
    config.head_dim = config.hidden_size / config.q_heads;
  } else {
    config.head_dim = reader.size("head_dim", 65536);
  }
  require(config.head_dim % 2 == 0, "{}: head_dim is {}; rotary embedding needs an even number", name, config.head_dim);
  config.max_positions = reader.size("max_position_embeddings", kMostPositions);
  config.rope_theta = read_rope_theta(reader);
  config.norm_epsilon = reader.positive("rms_norm_eps", get<double>(json, "rms_norm_eps", name));
  config.tied_head = reader.or_default<bool>("tie_word_embeddings", false);
  read_special_tokens(reader, config);
  return config;
}

}  // namespace tessera::model
