// The `normalizer` of tokenizer.json: what happens to a text before it is split.
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "io/json.h"
#include "model/text/pattern.h"

namespace tessera::model::text {

/// A pattern of tokenizer.json: {"String": text} or {"Regex": expression}.
Pattern read_pattern(const Json& object, std::string_view key, std::string_view name);
/// Bytes that a text of `bytes` may grow to: far more than any language needs, and a bound for hostile files.
constexpr std::size_t largest_text(std::size_t bytes) {
  return 64 * bytes + 65536;
}
/// Throws Error when a text of `before` bytes has grown to more than largest_text().
void check_growth(std::size_t before, std::size_t after);
/// The text with each match replaced. Throws Error when that makes it too large.
std::string replace_all(const Pattern& pattern, std::string_view replacement, std::string_view text);

/// Steps in order. Immutable and thread-safe.
class Normalizer {
 public:
  Normalizer() = default;
  /// `json` is the object, or null for none. Throws Error for a type that is not supported, with those that are.
  static Normalizer read(const Json& json, std::string_view name);
  /// Puts U+2581 for spaces, and one before the text if `prefix`: what sentencepiece models in GGUF ask for.
  static Normalizer sentencepiece(bool prefix);

  bool empty() const { return steps_.empty(); }
  /// Valid UTF-8 in, valid UTF-8 out.
  std::string apply(std::string text) const;

 private:
  using Step = std::function<std::string(std::string)>;
  void add(const Json& json, std::string_view name, int depth);
  std::vector<Step> steps_;
};

}  // namespace tessera::model::text
