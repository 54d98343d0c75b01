// Byte-level tokenizer: one token per byte, as tokenizer.json of the Hugging Face layout describes it.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "io/json.h"

namespace tessera::model {

class Tokenizer {
 public:
  /// Ids are byte values.
  static Tokenizer of_bytes();
  /// Reads a BPE vocabulary without merges whose entries are spelt in GPT-2's byte characters; ids are any
  /// permutation below vocab_size. Throws Error for merges, other models, normalizers, and ids out of range or given
  /// twice; the message lists what is supported.
  static Tokenizer read(const Json& json, std::string_view name, std::int64_t vocab_size);

  /// One id per byte. Throws Error for a byte without a token.
  std::vector<std::int32_t> encode(std::string_view text) const;
  /// Bytes of one token: empty for special tokens and unused ids.
  std::string_view bytes_of(std::int32_t token) const;
  std::string decode(std::span<const std::int32_t> tokens) const;

 private:
  Tokenizer();
  std::array<std::int32_t, 256> id_of_byte_;  ///< -1: the vocabulary lacks it
  std::vector<std::string> bytes_of_id_;
};

}  // namespace tessera::model
