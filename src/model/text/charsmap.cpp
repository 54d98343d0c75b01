#include "model/text/charsmap.h"

#include <array>
#include <cstring>

#include "core/error.h"
#include "model/text/normalizer.h"
#include "model/text/unicode.h"

namespace tessera::model::text {

namespace {

std::string from_base64(std::string_view text, std::string_view name) {
  constexpr std::string_view digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string bytes;
  std::uint32_t bits = 0;
  int held = 0;
  for (const char c : text) {
    if (c == '=') break;
    const std::size_t digit = digits.find(c);
    require(digit != std::string_view::npos, "{}: 'precompiled_charsmap' is not base64", name);
    bits = bits << 6 | static_cast<std::uint32_t>(digit);
    held += 6;
    if (held < 8) continue;
    held -= 8;
    bytes += static_cast<char>(bits >> held & 0xFF);
  }
  return bytes;
}

std::uint32_t word_at(std::string_view bytes, std::size_t place) {
  std::uint32_t word = 0;
  for (std::size_t i = 0; i < 4; ++i) {
    word |= static_cast<std::uint32_t>(static_cast<unsigned char>(bytes[place + i])) << (8 * i);
  }
  return word;
}

// A unit of the trie: leaf flag, label and offset of its children.
bool has_leaf(std::uint32_t unit) {
  return (unit >> 8 & 1) != 0;
}
std::uint32_t label_of(std::uint32_t unit) {
  return unit & (1U << 31 | 0xFFU);
}
std::uint32_t offset_of(std::uint32_t unit) {
  return (unit >> 10) << ((unit & 1U << 9) >> 6);
}

}  // namespace

CharacterMap::CharacterMap(std::string_view base64, std::string_view name) {
  const std::string bytes = from_base64(base64, name);
  require(bytes.size() >= 4, "{}: 'precompiled_charsmap' has {} bytes; expected at least 4", name, bytes.size());
  const std::size_t size = word_at(bytes, 0);
  require(size <= bytes.size() - 4 && size % 4 == 0,
          "{}: 'precompiled_charsmap' says that {} bytes of rules follow; expected a multiple of 4 up to {}", name,
          size, bytes.size() - 4);
  for (std::size_t i = 0; i < size / 4; ++i) trie_.push_back(word_at(bytes, 4 + 4 * i));
  replacements_ = bytes.substr(4 + size);
  require(is_valid_utf8(replacements_), "{}: 'precompiled_charsmap' has replacements that are not valid UTF-8", name);
}

bool CharacterMap::find(std::string_view part, std::string_view& replacement) const {
  if (trie_.empty()) return false;
  std::size_t node = offset_of(trie_[0]);
  for (const char c : part) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte == 0) return false;
    node ^= byte;
    if (node >= trie_.size()) return false;
    const std::uint32_t unit = trie_[node];
    if (label_of(unit) != byte) return false;
    node ^= offset_of(unit);
    if (node >= trie_.size()) return false;
    if (has_leaf(unit)) {
      const std::size_t begin = trie_[node] & 0x7FFFFFFFU;
      if (begin >= replacements_.size()) return false;
      const std::string_view rest = std::string_view(replacements_).substr(begin);
      // A place in the middle of a character would not be text.
      if (!is_valid_utf8(rest.substr(0, rest.find('\0')))) return false;
      replacement = rest.substr(0, rest.find('\0'));
      return true;
    }
  }
  return false;
}

std::string CharacterMap::apply(std::string_view text) const {
  std::string out;
  out.reserve(text.size());
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = grapheme_end(text, begin);
    std::string_view replacement;
    if (end - begin < 6 && find(text.substr(begin, end - begin), replacement)) {
      out += replacement;
    } else {
      for (std::size_t at = begin; at < end;) {
        const std::string_view character = text.substr(at, character_bytes(text[at]));
        out += find(character, replacement) ? replacement : character;
        at += character.size();
      }
    }
    begin = end;
    check_growth(text.size(), out.size());
  }
  return out;
}

}  // namespace tessera::model::text
