#include "model/text/byte_characters.h"

#include <fmt/format.h>

#include "model/text/unicode.h"

namespace tessera::model::text {

namespace {

constexpr std::size_t kCharacters = 256 + 68;

struct Tables {
  std::array<std::string, 256> characters;
  std::array<std::int16_t, kCharacters> bytes{};  ///< by code point; -1: none
};

Tables make_tables() {
  Tables tables;
  tables.bytes.fill(-1);
  unsigned spare = 256;
  for (unsigned byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    const unsigned code_point = printable ? byte : spare++;
    append_utf8(tables.characters[byte], code_point);
    tables.bytes[code_point] = static_cast<std::int16_t>(byte);
  }
  return tables;
}

const Tables& tables() {
  static const Tables instance = make_tables();
  return instance;
}

}  // namespace

const std::array<std::string, 256>& byte_characters() {
  return tables().characters;
}

std::string spelt_in_characters(std::string_view bytes) {
  std::string text;
  text.reserve(bytes.size() + bytes.size() / 4);
  for (const char c : bytes) text += byte_characters()[static_cast<unsigned char>(c)];
  return text;
}

std::optional<std::string> spelt_bytes(std::string_view characters) {
  std::string bytes;
  while (!characters.empty()) {
    if (character_bytes(characters[0]) > characters.size()) return std::nullopt;
    const CodePoint c = first_code_point(characters);
    if (c.value >= kCharacters || tables().bytes[c.value] < 0) return std::nullopt;
    bytes += static_cast<char>(tables().bytes[c.value]);
    characters.remove_prefix(c.bytes);
  }
  return bytes;
}

std::string byte_name(unsigned char byte) {
  return fmt::format("<0x{:02X}>", byte);
}

std::optional<unsigned char> named_byte(std::string_view name) {
  if (name.size() != 6 || !name.starts_with("<0x") || name[5] != '>') return std::nullopt;
  unsigned value = 0;
  for (const char c : name.substr(3, 2)) {
    const std::size_t digit = std::string_view("0123456789ABCDEF0123456789abcdef").find(c);
    if (digit == std::string_view::npos) return std::nullopt;
    value = value * 16 + static_cast<unsigned>(digit % 16);
  }
  return static_cast<unsigned char>(value);
}

}  // namespace tessera::model::text
