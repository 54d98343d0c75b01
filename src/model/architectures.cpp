#include "model/architectures.h"

#include <algorithm>
#include <array>
#include <cmath>

namespace tessera::model {

namespace {

/// Windows by `layer_types`, where the file has them. False: it does not say.
bool read_layer_types(const ConfigReader& reader, std::int64_t window, ModelConfig& config) {
  if (reader.find("layer_types") == nullptr) return false;
  const auto types = reader.value<std::vector<std::string>>("layer_types");
  require(std::ssize(types) == config.layers, "{}: 'layer_types' has {} entries; expected num_hidden_layers {}",
          reader.name(), types.size(), config.layers);
  for (std::size_t i = 0; i < types.size(); ++i) {
    require(types[i] == "full_attention" || types[i] == "sliding_attention",
            "{}: layer_types[{}] is '{}'; supported: full_attention, sliding_attention", reader.name(), i, types[i]);
    const bool sliding = types[i] == "sliding_attention";
    require(!sliding || window > 0, "{}: layer_types[{}] is 'sliding_attention', but 'sliding_window' is not set",
            reader.name(), i);
    config.layer_kinds[i].window = sliding ? window : 0;
  }
  return true;
}

/// window(layer) for every layer, unless `layer_types` says.
template <class InWindow>
void read_windows(const ConfigReader& reader, ModelConfig& config, const InWindow& in_window) {
  const std::int64_t window = reader.size_or("sliding_window", 0, kMostPositions);
  if (read_layer_types(reader, window, config)) return;
  for (std::int64_t i = 0; i < config.layers; ++i) {
    config.layer_kinds[static_cast<std::size_t>(i)].window = in_window(i) ? window : 0;
  }
}

void read_qwen_windows(const ConfigReader& reader, ModelConfig& config) {
  const bool used = reader.value_or("use_sliding_window", false);
  const auto first = reader.value_or<std::int64_t>("max_window_layers", 28);
  read_windows(reader, config, [&](std::int64_t layer) { return used && layer >= first; });
}

void read_llama(const ConfigReader& reader, ModelConfig& config) {
  require(reader.find("sliding_window") == nullptr, "{}: 'sliding_window' is set, which llama has not; expected null",
          reader.name());
  config.qkv_bias = config.output_bias = reader.value_or("attention_bias", false);
  config.mlp_bias = reader.value_or("mlp_bias", false);
}

void read_mistral(const ConfigReader& reader, ModelConfig& config) {
  read_windows(reader, config, [](std::int64_t) { return true; });
}

void read_qwen2(const ConfigReader& reader, ModelConfig& config) {
  config.qkv_bias = true;
  read_qwen_windows(reader, config);
}

void read_qwen3(const ConfigReader& reader, ModelConfig& config) {
  config.qkv_bias = config.output_bias = reader.value_or("attention_bias", false);
  config.qk_norm = true;
  read_qwen_windows(reader, config);
}

void read_qwen3_moe(const ConfigReader& reader, ModelConfig& config) {
  config.qkv_bias = config.output_bias = reader.value_or("attention_bias", false);
  config.qk_norm = true;
  const bool used = reader.value_or("use_sliding_window", false);
  read_windows(reader, config, [&](std::int64_t) { return used; });
  // Both spellings occur.
  const std::string_view count = reader.find("num_local_experts") != nullptr ? "num_local_experts" : "num_experts";
  config.experts.count = reader.size(count, kMostExperts);
  config.experts.chosen = reader.size("num_experts_per_tok", kMostExperts);
  config.experts.intermediate_size = reader.size("moe_intermediate_size", kLargestSize);
  config.experts.normalise = reader.value_or("norm_topk_prob", false);
  const std::int64_t step = reader.size_or("decoder_sparse_step", 1, kMostLayers);
  const auto dense = reader.value_or<std::vector<std::int64_t>>("mlp_only_layers", {});
  for (std::int64_t i = 0; i < config.layers; ++i) {
    const bool sparse = (i + 1) % step == 0 && std::find(dense.begin(), dense.end(), i) == dense.end();
    config.layer_kinds[static_cast<std::size_t>(i)].experts = sparse;
  }
}

void read_mixtral(const ConfigReader& reader, ModelConfig& config) {
  read_windows(reader, config, [](std::int64_t) { return true; });
  config.experts = {.count = reader.size("num_local_experts", kMostExperts),
                    .chosen = reader.size("num_experts_per_tok", kMostExperts),
                    .intermediate_size = config.intermediate_size,
                    .normalise = true};
  for (LayerConfig& layer : config.layer_kinds) layer.experts = true;
}

void read_gemma(const ConfigReader& reader, ModelConfig& config) {
  config.qkv_bias = config.output_bias = reader.value_or("attention_bias", false);
  config.norm_plus_one = true;
  config.embedding_scale = std::sqrt(static_cast<double>(config.hidden_size));
  // Early files say "gelu" and mean the approximation, with which the models were trained.
  if (config.activation == Activation::gelu) config.activation = Activation::gelu_tanh;
}

/// What Gemma 2 and 3 share.
void read_later_gemma(const ConfigReader& reader, ModelConfig& config) {
  read_gemma(reader, config);
  require(!reader.value_or("use_bidirectional_attention", false),
          "{}: 'use_bidirectional_attention' is true, which is not supported; expected false", reader.name());
  config.post_norms = true;
  config.attention_scale = 1 / std::sqrt(reader.positive_or("query_pre_attn_scalar", 256));
}

void read_gemma2(const ConfigReader& reader, ModelConfig& config) {
  read_later_gemma(reader, config);
  config.attention_softcap = reader.positive_or("attn_logit_softcapping", 0);
  config.final_softcap = reader.positive_or("final_logit_softcapping", 0);
  read_windows(reader, config, [](std::int64_t layer) { return layer % 2 == 0; });
}

void read_gemma3(const ConfigReader& reader, ModelConfig& config) {
  read_later_gemma(reader, config);
  config.qk_norm = true;
  config.attention_softcap = reader.positive_or("attn_logit_softcapping", 0);
  config.final_softcap = reader.positive_or("final_logit_softcapping", 0);
  const std::int64_t pattern = reader.size_or("sliding_window_pattern", 6, kMostLayers);
  read_windows(reader, config, [&](std::int64_t layer) { return (layer + 1) % pattern != 0; });
  for (LayerConfig& layer : config.layer_kinds) {
    if (layer.window > 0) layer.rope = LayerRope::local;
  }
}

void read_phi3(const ConfigReader& reader, ModelConfig& config) {
  config.fused_projections = true;
  read_windows(reader, config, [](std::int64_t) { return true; });
}

void read_smollm3(const ConfigReader& reader, ModelConfig& config) {
  config.qkv_bias = config.output_bias = reader.value_or("attention_bias", false);
  config.mlp_bias = reader.value_or("mlp_bias", false);
  const std::int64_t interval = reader.size_or("no_rope_layer_interval", 4, kMostLayers);
  std::vector<std::int64_t> rotated;
  for (std::int64_t i = 0; i < config.layers; ++i) rotated.push_back((i + 1) % interval != 0 ? 1 : 0);
  rotated = reader.value_or("no_rope_layers", rotated);
  require(std::ssize(rotated) == config.layers, "{}: 'no_rope_layers' has {} entries; expected num_hidden_layers {}",
          reader.name(), rotated.size(), config.layers);
  for (std::size_t i = 0; i < rotated.size(); ++i) {
    require(rotated[i] == 0 || rotated[i] == 1, "{}: no_rope_layers[{}] is {}; expected 0 (no rotation) or 1",
            reader.name(), i, rotated[i]);
    config.layer_kinds[i].rope = rotated[i] == 1 ? LayerRope::global : LayerRope::none;
  }
  if (!reader.value_or("use_sliding_window", false)) return;
  read_windows(reader, config, [&](std::int64_t layer) { return rotated[static_cast<std::size_t>(layer)] == 0; });
}

/// Values that published Gemma 3 files with a vision part leave out.
constexpr std::string_view kGemma3Defaults =
    R"({"vocab_size":262208,"num_attention_heads":8,"num_key_value_heads":4,"head_dim":256,)"
    R"("max_position_embeddings":131072,"rms_norm_eps":1e-6,"sliding_window":4096})";

constexpr std::array kArchitectures{
    Architecture{.info = {"llama", "LlamaForCausalLM", "Llama 2, 3, 3.1, 3.2; SmolLM, SmolLM2; TinyLlama", ""},
                 .read = read_llama},
    Architecture{.info = {"mistral", "MistralForCausalLM", "Mistral 7B, Nemo, Small", "sliding window"},
                 .read = read_mistral},
    Architecture{.info = {"mixtral", "MixtralForCausalLM", "Mixtral 8x7B, 8x22B",
                          "mixture of experts, weights of the chosen add up to 1"},
                 .read = read_mixtral,
                 .rope_theta = 1e6},
    Architecture{.info = {"qwen2", "Qwen2ForCausalLM", "Qwen2, Qwen2.5, DeepSeek-R1-Distill-Qwen",
                          "biases of queries, keys and values; sliding window in upper layers if asked for"},
                 .read = read_qwen2},
    Architecture{.info = {"qwen3", "Qwen3ForCausalLM", "Qwen3", "norms of queries and keys, head_dim of its own"},
                 .read = read_qwen3,
                 .head_dim = 128},
    Architecture{.info = {"qwen3_moe", "Qwen3MoeForCausalLM", "Qwen3-30B-A3B, Qwen3-235B-A22B",
                          "as qwen3, with a mixture of experts in all or some layers"},
                 .read = read_qwen3_moe},
    Architecture{.info = {"gemma", "GemmaForCausalLM", "Gemma 2B, 7B", "norms by 1 + weight, scaled embeddings, GELU"},
                 .read = read_gemma,
                 .tied_head = true,
                 .head_dim = 256,
                 .activation = "gelu_pytorch_tanh"},
    Architecture{.info = {"gemma2", "Gemma2ForCausalLM", "Gemma 2 2B, 9B, 27B",
                          "as gemma, with norms behind both parts, capped scores and logits, every other layer local"},
                 .read = read_gemma2,
                 .tied_head = true,
                 .head_dim = 256,
                 .activation = "gelu_pytorch_tanh"},
    Architecture{.info = {"gemma3_text", "Gemma3ForCausalLM", "Gemma 3 270M, 1B; the text part of the others (gemma3)",
                          "as gemma2 without caps, with norms of queries and keys, five local layers per global one, "
                          "each kind with its rotary base"},
                 .read = read_gemma3,
                 .tied_head = true,
                 .head_dim = 256,
                 .rope_theta = 1e6,
                 .activation = "gelu_pytorch_tanh"},
    Architecture{.info = {"phi3", "Phi3ForCausalLM", "Phi-3, Phi-3.5, Phi-4, Phi-4-mini",
                          "fused projections, sliding window, longrope, partial rotation"},
                 .read = read_phi3},
    Architecture{.info = {"smollm3", "SmolLM3ForCausalLM", "SmolLM3", "layers without rotation"},
                 .read = read_smollm3,
                 .tied_head = true,
                 .rope_theta = 2e6},
};

std::string supported() {
  std::string text;
  for (const Architecture& a : kArchitectures) {
    text += fmt::format("{}{} ({})", text.empty() ? "" : ", ", a.info.name, a.info.class_name);
  }
  return text;
}

}  // namespace

Json text_config(const Json& json, std::string_view name) {
  if (!json.is_object() || !json.contains("text_config") || !json["text_config"].is_object()) return json;
  if (get_or<std::string>(json, "model_type", name, "") != "gemma3") return json;
  Json text = Json::parse(kGemma3Defaults);
  for (const char* key : {"bos_token_id", "eos_token_id", "tie_word_embeddings", "quantization_config"}) {
    if (json.contains(key)) text[key] = json[key];
  }
  for (const auto& [key, value] : json["text_config"].items()) text[key] = value;
  text["model_type"] = "gemma3_text";
  text.erase("architectures");
  return text;
}

const Architecture& find_architecture(const ConfigReader& reader) {
  const auto type = reader.value<std::string>("model_type");
  const auto found = std::find_if(kArchitectures.begin(), kArchitectures.end(),
                                  [&](const Architecture& a) { return a.info.name == type; });
  require(found != kArchitectures.end(), "{}: model_type '{}' is not supported; supported: {}", reader.name(), type,
          supported());
  for (const auto& name : reader.value_or<std::vector<std::string>>("architectures", {})) {
    require(name == found->info.class_name, "{}: architecture '{}' is not supported; supported: {}", reader.name(),
            name, supported());
  }
  return *found;
}

}  // namespace tessera::model

namespace tessera {

std::span<const ArchitectureInfo> architectures() {
  static const auto infos = [] {
    std::array<ArchitectureInfo, model::kArchitectures.size()> result;
    std::transform(model::kArchitectures.begin(), model::kArchitectures.end(), result.begin(),
                   [](const model::Architecture& a) { return a.info; });
    return result;
  }();
  return infos;
}

}  // namespace tessera
