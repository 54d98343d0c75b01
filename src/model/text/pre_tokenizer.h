// The `pre_tokenizer` of tokenizer.json: cuts a text into the words that the model encodes one by one.
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "io/json.h"
#include "model/text/pattern.h"

namespace tessera::model::text {

/// A text and how it is cut; words cover it or leave parts out, in order.
struct Words {
  std::string text;
  std::vector<Range> ranges;
  bool at_start = false;  ///< the text begins where the input began
};

/// What becomes of the matches of a pattern that cuts.
enum class MatchUse { removed, isolated, with_previous, with_next, contiguous };

/// Steps in order. Immutable and thread-safe.
class PreTokenizer {
 public:
  PreTokenizer() = default;
  /// `json` is the object, or null for none. Throws Error for a type that is not supported, with those that are.
  static PreTokenizer read(const Json& json, std::string_view name);
  /// What `tokenizer.ggml.pre` of a GGUF file names, bytes spelt as characters. Throws Error for unknown names, with
  /// those that are known.
  static PreTokenizer of_gguf(std::string_view pre, std::string_view name);

  /// Cuts valid UTF-8.
  Words apply(std::string text, bool at_start) const;

 private:
  using Step = std::function<void(Words&)>;
  void add(const Json& json, std::string_view name, int depth);
  void add_split(const Pattern& pattern, MatchUse use, bool invert = false);
  std::vector<Step> steps_;
};

}  // namespace tessera::model::text
