// The precompiled normalisation rules of sentencepiece models.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace tessera::model::text {

/// A double-array trie (Darts) of character sequences and what replaces each.
class CharacterMap {
 public:
  /// Reads the base64 of `precompiled_charsmap`. Throws Error when it is damaged.
  CharacterMap(std::string_view base64, std::string_view name);

  /// Replaces grapheme clusters of less than six bytes whole, where the rules know a beginning of them, else character
  /// by character; what no rule knows stays. That is how the package `tokenizers` applies the rules.
  std::string apply(std::string_view text) const;

 private:
  /// The replacement of the shortest beginning of `part` that has one.
  bool find(std::string_view part, std::string_view& replacement) const;

  std::vector<std::uint32_t> trie_;
  std::string replacements_;  ///< each ends with a zero byte
};

}  // namespace tessera::model::text
