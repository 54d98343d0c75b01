// The tokenizer of a model folder in Hugging Face layout.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>

#include "model/tokenizer.h"

namespace tessera::model {

/// Reads tokenizer.json, and of tokenizer_config.json whether a beginning-of-sequence token is put before texts.
/// Without tokenizer.json ids are byte values. Throws Error as Tokenizer::read does, and for a vocabulary of bytes with
/// vocab_size below 256.
Tokenizer read_tokenizer(const std::filesystem::path& folder, std::int64_t vocab_size);

/// The source of the chat template: chat_template.jinja, else `chat_template` of tokenizer_config.json (of a list the
/// one named "default"); nothing if there is none.
std::optional<std::string> read_chat_template(const std::filesystem::path& folder);

}  // namespace tessera::model
