// UTF-8 and the few Unicode properties that tokenizers ask for.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace tessera::model::text {

/// One code point of valid UTF-8 and the bytes it takes.
struct CodePoint {
  char32_t value;
  std::size_t bytes;
};
/// The code point at the start of a valid, non-empty text.
CodePoint first_code_point(std::string_view text);
/// Bytes of the character that starts with this byte in valid UTF-8.
constexpr std::size_t character_bytes(char first) {
  const auto byte = static_cast<unsigned char>(first);
  if (byte < 0x80) return 1;
  if (byte < 0xE0) return 2;
  return byte < 0xF0 ? 3 : 4;
}
void append_utf8(std::string& text, char32_t code_point);

/// The text with each maximal ill-formed part replaced by U+FFFD, as the Unicode standard recommends (3.9) and Python's
/// and Rust's lossy decoding do.
std::string replace_invalid(std::string_view text);
bool is_valid_utf8(std::string_view text);

/// White_Space of the Unicode character database.
bool is_white_space(char32_t code_point);
/// What \w matches: letters, marks, decimal digits, connectors.
bool is_word_character(char32_t code_point);
/// General categories Mn, Mc, Me.
bool is_mark(char32_t code_point);

enum class NormalForm { nfc, nfd, nfkc, nfkd };
/// The text in a normal form. `text` must be valid UTF-8.
std::string normal_form(const std::string& text, NormalForm form);
/// Every character in lower case by itself, without context.
std::string lower_case(std::string_view text);

/// End of the extended grapheme cluster that starts at `begin` of a valid text.
std::size_t grapheme_end(std::string_view text, std::size_t begin);

}  // namespace tessera::model::text
