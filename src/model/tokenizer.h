// Text to token ids and back, as tokenizer.json of the Hugging Face layout or the metadata of a GGUF file say.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "io/json.h"

namespace tessera::model {

/// A stretch of a text to encode.
struct TextPart {
  std::string text;
  bool markup = false;  ///< names of special tokens in it are those tokens; elsewhere they are text
};

/// Immutable and thread-safe; copies share what they hold.
class Tokenizer {
 public:
  /// Ids are byte values.
  static Tokenizer of_bytes();
  /// Reads tokenizer.json: BPE (byte-level, or over characters with byte fallback) and unigram models, with their
  /// normalizers, pre-tokenizers, added tokens and decoders. Throws Error for what is not supported, naming what is,
  /// and for ids that are not below vocab_size or given twice.
  static Tokenizer read(const Json& json, std::string_view name, std::int64_t vocab_size);

  /// Ids of a text. Ill-formed UTF-8 becomes U+FFFD, except in byte-level vocabularies without merges: there every byte
  /// is a token, and an Error names a byte without one. Names of special tokens are text unless `special_names`.
  std::vector<std::int32_t> encode(std::string_view text, bool special_names = false) const;
  /// The same for a text in parts, which are joined before they are cut into words.
  std::vector<std::int32_t> encode(std::span<const TextPart> parts) const;

  /// Bytes of one token in the middle of a text: empty for special tokens and unused ids.
  std::string_view bytes_of(std::int32_t token) const;
  /// Bytes of a whole text. Bytes that are no valid UTF-8 come back as they are.
  std::string decode(std::span<const std::int32_t> tokens) const;

  /// The tokens that stand before every text; absent if the file does not say.
  const std::optional<std::vector<std::int32_t>>& prefix() const { return prefix_; }
  void set_prefix(std::vector<std::int32_t> prefix) { prefix_ = std::move(prefix); }
  /// How the vocabulary spells a token; empty for unused ids.
  std::string_view name_of(std::int32_t token) const;
  /// The id of a token by its name.
  std::optional<std::int32_t> id_of(std::string_view token) const;

  struct Parts;
  explicit Tokenizer(std::shared_ptr<const Parts> parts) : parts_(std::move(parts)) {}

 private:
  std::shared_ptr<const Parts> parts_;
  std::optional<std::vector<std::int32_t>> prefix_;
};

}  // namespace tessera::model
