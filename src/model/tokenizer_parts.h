// What a tokenizer consists of, for the readers of its files.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "model/text/added_tokens.h"
#include "model/text/normalizer.h"
#include "model/text/pre_tokenizer.h"
#include "model/text/token_decoder.h"
#include "model/text/word_model.h"
#include "model/tokenizer.h"

namespace tessera::model {

struct Tokenizer::Parts {
  enum class Kind : std::uint8_t { unused, text, special };

  std::vector<std::string> tokens;  ///< by id, as the vocabulary spells them
  std::vector<Kind> kinds;          ///< by id
  std::vector<std::string> bytes;   ///< by id, what bytes_of() returns
  text::IdOfToken ids;              ///< of the vocabulary, without tokens that are only added
  std::vector<text::AddedToken> added;

  /// Set for vocabularies of bytes; nothing below is used then but `raw_names`.
  std::optional<std::array<std::int32_t, 256>> id_of_byte;

  text::AddedTokenFinder raw_names;         ///< in the text as it comes
  text::AddedTokenFinder normalized_names;  ///< in the normalised text
  text::Normalizer normalizer;
  text::PreTokenizer pre_tokenizer;
  std::unique_ptr<const text::WordModel> model;
  text::TokenDecoder decoder;

  /// Gives an id its token. The id must be checked against the vocabulary's size.
  void place(std::int32_t id, std::string token, Kind kind);
  /// Sorts the added tokens into the finders and spells every token; call it last.
  void finish();
};

/// The name of a token for messages.
inline std::string_view shortened(std::string_view token) {
  return token.substr(0, 60);
}

}  // namespace tessera::model
