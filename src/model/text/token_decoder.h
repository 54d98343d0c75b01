// The `decoder` of tokenizer.json: from tokens back to text.
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "io/json.h"

namespace tessera::model::text {

/// Steps over the list of tokens, in order. Immutable and thread-safe.
class TokenDecoder {
 public:
  TokenDecoder() = default;
  /// `json` is the object, or null for none. Throws Error for a type that is not supported, with those that are.
  static TokenDecoder read(const Json& json, std::string_view name);
  static TokenDecoder byte_level();
  /// Of sentencepiece models in GGUF: U+2581 is a space, the first of a text goes if a prefix was put there.
  static TokenDecoder sentencepiece(bool prefix);

  /// Bytes of a sequence of tokens. Bytes that stand for no valid UTF-8 stay as they are. `continues`: tokens came
  /// before these, so that what only concerns the beginning of a text is left alone.
  std::string apply(std::vector<std::string> tokens, bool continues) const;

 private:
  using Step = std::function<void(std::vector<std::string>& tokens, bool continues)>;
  void add(const Json& json, std::string_view name, int depth);
  std::vector<Step> steps_;
};

}  // namespace tessera::model::text
