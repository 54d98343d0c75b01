// Loading a model folder.
#include "core/error.h"
#include "io/json.h"
#include "model/config.h"
#include "model/parts.h"
#include "model/safetensors_source.h"

namespace tessera {

namespace {

model::Tokenizer load_tokenizer(const std::filesystem::path& folder, const ModelConfig& config) {
  const auto path = folder / "tokenizer.json";
  std::error_code ignored;
  if (std::filesystem::exists(path, ignored)) {
    return model::Tokenizer::read(parse_json_file(path), path.string(), config.vocab_size);
  }
  require(
      config.vocab_size >= 256,
      "{}: there is no tokenizer.json, and vocab_size {} is too small for byte values as ids; expected at least 256",
      folder.string(), config.vocab_size);
  return model::Tokenizer::of_bytes();
}

}  // namespace

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
  model::Tokenizer tokenizer = load_tokenizer(folder, config);
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
  if (with_bos && parts_->config.bos_token) tokens.insert(tokens.begin(), *parts_->config.bos_token);
  return tokens;
}

std::string Model::decode(std::span<const std::int32_t> tokens) const {
  return parts_->tokenizer.decode(tokens);
}

}  // namespace tessera
