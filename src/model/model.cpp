// Loading a model folder.
#include "core/error.h"
#include "io/json.h"
#include "model/config.h"
#include "model/parts.h"
#include "model/safetensors_source.h"
#include "model/tokenizer_folder.h"

namespace tessera {

Model::Model(std::unique_ptr<const Parts> parts) : parts_(std::move(parts)) {}
Model::Model(Model&&) noexcept = default;
Model& Model::operator=(Model&&) noexcept = default;
Model::~Model() = default;

Model Model::load(const std::filesystem::path& folder, int) {
  std::error_code ignored;
  require(std::filesystem::is_directory(folder, ignored), "model '{}' is not a folder with config.json",
          folder.string());
  const auto path = folder / "config.json";
  ModelConfig config = model::read_config(parse_json_file(path), path.string());
  model::Tokenizer tokenizer = model::read_tokenizer(folder, config.vocab_size);
  model::Weights weights = model::load_weights(model::open_safetensors(folder), config);
  return Model(std::make_unique<const Parts>(Parts{std::move(config), std::move(weights), std::move(tokenizer)}));
}

const ModelConfig& Model::config() const {
  return parts_->config;
}

std::size_t Model::weight_bytes() const {
  return parts_->weights.heap_bytes();
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

std::string Model::decode(std::span<const std::int32_t> tokens) const {
  return parts_->tokenizer.decode(tokens);
}

}  // namespace tessera
