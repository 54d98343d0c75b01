#include "model/tokenizer_folder.h"

#include "core/error.h"

namespace tessera::model {

namespace {

constexpr std::string_view kTokenizer = "tokenizer.json";
constexpr std::string_view kConfig = "tokenizer_config.json";
constexpr std::string_view kTemplate = "chat_template.jinja";

bool is_there(const std::filesystem::path& path) {
  std::error_code ignored;
  return std::filesystem::exists(path, ignored);
}

/// A token is written as its text or as an object that describes it.
std::optional<std::string> token_text(const Json& config, std::string_view key, const std::string& name) {
  const auto value = get_optional<Json>(config, key, name);
  if (!value) return std::nullopt;
  if (value->is_object()) return get<std::string>(*value, "content", fmt::format("{}: '{}'", name, key));
  return get<std::string>(config, key, name);
}

void read_prefix(const std::filesystem::path& path, Tokenizer& tokenizer) {
  const Json config = parse_json_file(path);
  const std::string name = path.string();
  const auto wanted = get_optional<bool>(config, "add_bos_token", name);
  if (!wanted) return;
  if (!*wanted) {
    tokenizer.set_prefix({});
    return;
  }
  if (tokenizer.prefix() && !tokenizer.prefix()->empty()) return;
  const auto bos = token_text(config, "bos_token", name);
  require(bos.has_value(), "{}: 'add_bos_token' is true and 'bos_token' is missing", name);
  const auto id = tokenizer.id_of(*bos);
  require(id.has_value(), "{}: 'bos_token' is '{}', which is not in the vocabulary", name, bos->substr(0, 60));
  tokenizer.set_prefix({*id});
}

}  // namespace

Tokenizer read_tokenizer(const std::filesystem::path& folder, std::int64_t vocab_size) {
  const auto path = folder / kTokenizer;
  if (!is_there(path)) {
    require(vocab_size >= 256,
            "{}: there is no tokenizer.json, and vocab_size {} is too small for byte values as ids; expected at least "
            "256",
            folder.string(), vocab_size);
    return Tokenizer::of_bytes();
  }
  Tokenizer tokenizer = Tokenizer::read(parse_json_file(path), path.string(), vocab_size);
  if (is_there(folder / kConfig)) read_prefix(folder / kConfig, tokenizer);
  return tokenizer;
}

std::optional<std::string> read_chat_template(const std::filesystem::path& folder) {
  if (is_there(folder / kTemplate)) return read_text_file(folder / kTemplate, std::size_t{1} << 20);
  const auto path = folder / kConfig;
  if (!is_there(path)) return std::nullopt;
  const auto value = get_optional<Json>(parse_json_file(path), "chat_template", path.string());
  if (!value) return std::nullopt;
  if (value->is_string()) return value->get<std::string>();
  require(value->is_array(), "{}: 'chat_template' is neither a text nor a list", path.string());
  const std::string where = fmt::format("{}: 'chat_template'", path.string());
  for (const Json& entry : *value) {
    if (get<std::string>(entry, "name", where) == "default") return get<std::string>(entry, "template", where);
  }
  return std::nullopt;
}

}  // namespace tessera::model
