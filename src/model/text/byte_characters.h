// The printable characters that stand for bytes in byte-level vocabularies, the table of GPT-2.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace tessera::model::text {

/// UTF-8 of the character that stands for each byte: printable bytes stand for themselves, the others for the code
/// points from 256 on, in order.
const std::array<std::string, 256>& byte_characters();

/// Each byte of a text as its character.
std::string spelt_in_characters(std::string_view bytes);
/// The bytes that a text of such characters spells; nothing if it holds others.
std::optional<std::string> spelt_bytes(std::string_view characters);

/// The name of a byte in vocabularies with byte fallback: "<0x0A>".
std::string byte_name(unsigned char byte);
/// The byte of such a name.
std::optional<unsigned char> named_byte(std::string_view name);

}  // namespace tessera::model::text
