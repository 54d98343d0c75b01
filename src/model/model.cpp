// Loading a model.
#include <algorithm>

#include "core/error.h"
#include "io/gguf.h"
#include "io/json.h"
#include "model/chat_template.h"
#include "model/config.h"
#include "model/gguf_config.h"
#include "model/gguf_source.h"
#include "model/parts.h"
#include "model/safetensors_source.h"
#include "model/tokenizer_folder.h"
#include "model/tokenizer_gguf.h"
#include "model/weight_memory.h"

namespace tessera {

namespace {

/// Ends of answers that chat models write, beside those of the configuration.
void add_end_of_turn(Model::Parts& parts) {
  if (!parts.chat_template) return;
  try {
    const auto known = model::ChatTemplate::recognise(*parts.chat_template, parts.name);
    const auto id = parts.tokenizer.id_of(known.end_of_turn());
    auto& ends = parts.config.eos_tokens;
    if (id && *id < parts.config.vocab_size && std::find(ends.begin(), ends.end(), *id) == ends.end()) {
      ends.push_back(*id);
    }
  } catch (const Error&) {  // NOLINT(bugprone-empty-catch): only encode_chat() needs to know the template
  }
}

/// `eos_token_id` of generation_config.json, which knows ends that config.json does not.
void read_generation_config(const std::filesystem::path& path, ModelConfig& config) {
  std::error_code ignored;
  if (!std::filesystem::exists(path, ignored)) return;
  const Json json = parse_json_file(path);
  const auto eos = get_optional<Json>(json, "eos_token_id", path.string());
  if (!eos) return;
  const auto tokens = eos->is_array() ? get<std::vector<std::int64_t>>(json, "eos_token_id", path.string())
                                      : std::vector{get<std::int64_t>(json, "eos_token_id", path.string())};
  for (const std::int64_t token : tokens) {
    require(token >= 0 && token < config.vocab_size, "{}: 'eos_token_id' is {}; expected an id below vocab_size {}",
            path.string(), token, config.vocab_size);
    auto& ends = config.eos_tokens;
    const auto id = static_cast<std::int32_t>(token);
    if (std::find(ends.begin(), ends.end(), id) == ends.end()) ends.push_back(id);
  }
}

std::unique_ptr<const Model::Parts> load_folder(const std::filesystem::path& folder, const LoadOptions& options) {
  const auto path = folder / "config.json";
  ModelConfig config = model::read_config(parse_json_file(path), path.string());
  read_generation_config(folder / "generation_config.json", config);
  model::Tokenizer tokenizer = model::read_tokenizer(folder, config.vocab_size);
  model::Weights weights = model::load_weights(model::open_safetensors(folder, options), config);
  auto parts = std::make_unique<Model::Parts>(Model::Parts{std::move(config), std::move(weights), std::move(tokenizer),
                                                           model::read_chat_template(folder), folder.string()});
  add_end_of_turn(*parts);
  return parts;
}

std::unique_ptr<const Model::Parts> load_gguf(const std::filesystem::path& path, const LoadOptions& options) {
  GgufFile file = GgufFile::open(path, model::memory_of_weights({path}, options.weights), options.threads);
  ModelConfig config = model::read_config(file);
  model::Tokenizer tokenizer = model::read_tokenizer(file);
  auto chat_template = file.get_optional<std::string>("tokenizer.chat_template");
  model::Weights weights = model::load_weights(model::open_gguf(std::move(file)), config);
  auto parts = std::make_unique<Model::Parts>(Model::Parts{std::move(config), std::move(weights), std::move(tokenizer),
                                                           std::move(chat_template), path.string()});
  add_end_of_turn(*parts);
  return parts;
}

}  // namespace

Model::Model(std::unique_ptr<const Parts> parts) : parts_(std::move(parts)) {}
Model::Model(Model&&) noexcept = default;
Model& Model::operator=(Model&&) noexcept = default;
Model::~Model() = default;

Model Model::load(const std::filesystem::path& path, const LoadOptions& options) {
  std::error_code ignored;
  if (std::filesystem::is_directory(path, ignored)) return Model(load_folder(path, options));
  require(path.extension() == ".gguf", "model '{}' is neither a folder with config.json nor a *.gguf file",
          path.string());
  return Model(load_gguf(path, options));
}

const ModelConfig& Model::config() const {
  return parts_->config;
}

std::size_t Model::weight_bytes() const {
  return parts_->weights.heap_bytes();
}

double Model::decoded_weight_bytes() const {
  return parts_->weights.decoded_bytes(parts_->config.experts.chosen);
}

std::vector<std::int32_t> Model::encode(std::string_view text, bool with_bos) const {
  std::vector<std::int32_t> tokens = parts_->tokenizer.encode(text);
  if (!with_bos) return tokens;
  if (const auto& prefix = parts_->tokenizer.prefix()) {
    tokens.insert(tokens.begin(), prefix->begin(), prefix->end());
  } else if (parts_->config.bos_token) {
    tokens.insert(tokens.begin(), *parts_->config.bos_token);
  }
  return tokens;
}

std::vector<std::int32_t> Model::encode_chat(std::span<const ChatMessage> messages) const {
  require(parts_->chat_template.has_value(), "{}: the model has no chat template", parts_->name);
  const auto known = model::ChatTemplate::recognise(*parts_->chat_template, parts_->name);
  const model::Tokenizer& tokenizer = parts_->tokenizer;
  const ModelConfig& config = parts_->config;
  std::optional<std::int32_t> bos = config.bos_token;
  if (!bos && tokenizer.prefix() && !tokenizer.prefix()->empty()) bos = tokenizer.prefix()->front();
  const std::string_view bos_text = bos ? tokenizer.name_of(*bos) : std::string_view();
  const std::string_view eos_text =
      config.eos_tokens.empty() ? std::string_view() : tokenizer.name_of(config.eos_tokens.front());
  std::vector<std::int32_t> tokens = tokenizer.encode(known.render(messages, bos_text, eos_text));
  if (known.begins_with_bos() && bos) tokens.insert(tokens.begin(), *bos);
  return tokens;
}

std::string Model::decode(std::span<const std::int32_t> tokens) const {
  return parts_->tokenizer.decode(tokens);
}

}  // namespace tessera
