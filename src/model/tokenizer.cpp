#include "model/tokenizer.h"

#include <map>
#include <optional>
#include <unordered_map>
#include <unordered_set>

#include "core/error.h"

namespace tessera::model {

namespace {

constexpr std::string_view kSupported =
    "supported: byte-level BPE without merges (model.type 'BPE', pre_tokenizer 'ByteLevel', no normalizer)";

/// UTF-8 of a code point below 2048.
std::string utf8(unsigned code_point) {
  if (code_point < 0x80) return {static_cast<char>(code_point)};
  return {static_cast<char>(0xC0 | code_point >> 6), static_cast<char>(0x80 | (code_point & 0x3F))};
}

/// The printable character that stands for each byte in byte-level vocabularies (the table of GPT-2): printable bytes
/// stand for themselves, the others for the code points from 256 on, in order.
std::unordered_map<std::string, unsigned char> bytes_by_character() {
  std::unordered_map<std::string, unsigned char> table;
  unsigned spare = 256;
  for (unsigned byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    table.emplace(utf8(printable ? byte : spare++), static_cast<unsigned char>(byte));
  }
  return table;
}

/// The bytes that a vocabulary entry spells; nothing if it holds other characters.
std::optional<std::string> spelt_bytes(const std::string& entry,
                                       const std::unordered_map<std::string, unsigned char>& table) {
  std::string bytes;
  for (std::size_t i = 0; i < entry.size();) {
    const std::size_t length = static_cast<unsigned char>(entry[i]) < 0x80 ? 1 : 2;
    const auto found = table.find(entry.substr(i, length));
    if (found == table.end()) return std::nullopt;
    bytes.push_back(static_cast<char>(found->second));
    i += length;
  }
  return bytes;
}

/// `object[key]` is null, absent or an object of that type.
void check_part(const Json& json, std::string_view key, std::string_view type, bool required, std::string_view name) {
  const auto part = get_optional<Json>(json, key, name);
  if (!part) {
    require(!required, "{}: '{}' is missing; {}", name, key, kSupported);
    return;
  }
  const auto actual = get<std::string>(*part, "type", fmt::format("{}: '{}'", name, key));
  require(actual == type, "{}: {} of type '{}' is not supported; {}", name, key, actual, kSupported);
}

std::int64_t checked_id(const Json& value, std::string_view entry, std::string_view name, std::int64_t vocab_size) {
  require(value.is_number_integer(), "{}: token '{}' has an id that is no integer", name, entry.substr(0, 60));
  const auto id = value.is_number_unsigned() && value.get<std::uint64_t>() >= std::uint64_t{1} << 62
                      ? std::int64_t{-1}
                      : value.get<std::int64_t>();
  require(id >= 0 && id < vocab_size, "{}: token '{}' has id {}; expected an id below vocab_size {}", name,
          entry.substr(0, 60), value.dump(), vocab_size);
  return id;
}

}  // namespace

Tokenizer::Tokenizer() {
  id_of_byte_.fill(-1);
}

Tokenizer Tokenizer::of_bytes() {
  Tokenizer tokenizer;
  for (int byte = 0; byte < 256; ++byte) {
    tokenizer.id_of_byte_[static_cast<std::size_t>(byte)] = byte;
    tokenizer.bytes_of_id_.emplace_back(1, static_cast<char>(byte));
  }
  return tokenizer;
}

Tokenizer Tokenizer::read(const Json& json, std::string_view name, std::int64_t vocab_size) {
  const Json model = get<Json>(json, "model", name);
  const std::string where = fmt::format("{}: 'model'", name);
  // Early files leave the type of BPE models out.
  const auto type = get_or<std::string>(model, "type", where, "BPE");
  require(type == "BPE", "{}: model.type '{}' is not supported; {}", name, type, kSupported);
  const auto merges = get_optional<Json>(model, "merges", where);
  require(!merges || merges->empty(), "{}: model.merges has {} entries, which are not supported; {}", name,
          merges ? merges->size() : 0, kSupported);
  require(!get_optional<Json>(json, "normalizer", name), "{}: 'normalizer' is set, which is not supported; {}", name,
          kSupported);
  check_part(json, "pre_tokenizer", "ByteLevel", true, name);
  check_part(json, "decoder", "ByteLevel", false, name);
  const auto splitter = get<Json>(json, "pre_tokenizer", name);
  require(!get_or<bool>(splitter, "add_prefix_space", fmt::format("{}: 'pre_tokenizer'", name), false),
          "{}: pre_tokenizer.add_prefix_space is true, which is not supported; {}", name, kSupported);

  // Added tokens also stand in the vocabulary or not, as the writer pleases: they win.
  std::map<std::int64_t, std::string> added;
  const auto added_tokens = get_or<Json>(json, "added_tokens", name, Json::array());
  require(added_tokens.is_array(), "{}: 'added_tokens' is no list", name);
  for (const Json& token : added_tokens) {
    const std::string entry = fmt::format("{}: 'added_tokens'", name);
    auto content = get<std::string>(token, "content", entry);
    const auto id = checked_id(get<Json>(token, "id", entry), content, name, vocab_size);
    require(added.emplace(id, std::move(content)).second, "{}: two added tokens have id {}", name, id);
  }

  const Json vocabulary = get<Json>(model, "vocab", where);
  require(vocabulary.is_object(), "{}: 'vocab' is no object", where);
  const auto table = bytes_by_character();
  Tokenizer tokenizer;
  std::unordered_set<std::int64_t> used;
  const auto place = [&](std::int64_t id, std::string bytes) {
    if (static_cast<std::int64_t>(tokenizer.bytes_of_id_.size()) <= id) {
      tokenizer.bytes_of_id_.resize(static_cast<std::size_t>(id) + 1);
    }
    if (bytes.size() == 1) {
      tokenizer.id_of_byte_[static_cast<unsigned char>(bytes[0])] = static_cast<std::int32_t>(id);
    }
    tokenizer.bytes_of_id_[static_cast<std::size_t>(id)] = std::move(bytes);
  };
  for (const auto& [entry, value] : vocabulary.items()) {
    const auto id = checked_id(value, entry, name, vocab_size);
    require(used.insert(id).second, "{}: id {} is given to two tokens, one of them '{}'", name, id,
            entry.substr(0, 60));
    if (const auto special = added.find(id); special != added.end()) {
      require(special->second == entry, "{}: id {} is '{}' in the vocabulary and '{}' among the added tokens", name, id,
              entry.substr(0, 60), special->second.substr(0, 60));
      continue;
    }
    auto bytes = spelt_bytes(entry, table);
    require(bytes.has_value(), "{}: token '{}' is not spelt in byte-level characters; {}", name, entry.substr(0, 60),
            kSupported);
    place(id, *std::move(bytes));
  }
  return tokenizer;
}

std::vector<std::int32_t> Tokenizer::encode(std::string_view text) const {
  std::vector<std::int32_t> tokens;
  tokens.reserve(text.size());
  for (std::size_t i = 0; i < text.size(); ++i) {
    const auto byte = static_cast<unsigned char>(text[i]);
    require(id_of_byte_[byte] >= 0, "the vocabulary has no token for byte 0x{:02x} at offset {} of the text", byte, i);
    tokens.push_back(id_of_byte_[byte]);
  }
  return tokens;
}

std::string_view Tokenizer::bytes_of(std::int32_t token) const {
  if (token < 0 || token >= static_cast<std::int64_t>(bytes_of_id_.size())) return {};
  return bytes_of_id_[static_cast<std::size_t>(token)];
}

std::string Tokenizer::decode(std::span<const std::int32_t> tokens) const {
  std::string text;
  for (const std::int32_t token : tokens) text += bytes_of(token);
  return text;
}

}  // namespace tessera::model
