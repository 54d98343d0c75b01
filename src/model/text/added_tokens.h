// Tokens that are found in a text before anything else: the names of special tokens, and words that were added.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "io/json.h"
#include "model/text/pattern.h"

namespace tessera::model::text {

struct AddedToken {
  std::string content;
  std::int32_t id = 0;
  bool special = false;      ///< stands for no text
  bool single_word = false;  ///< only where no word character is next to it
  bool lstrip = false;       ///< takes the white space before it along
  bool rstrip = false;       ///< and behind it
  bool normalized = true;    ///< looked for in the normalised text, itself normalised
};

/// A stretch of a text: a token, or what lies between.
struct Stretch {
  Range range;
  std::int32_t token = -1;  ///< -1: text
};

/// Finds names in one pass over the text: the first that begins, the longest of those. Immutable.
class AddedTokenFinder {
 public:
  AddedTokenFinder() : nodes_(1) {}
  /// Empty contents are left out.
  explicit AddedTokenFinder(std::span<const AddedToken> tokens);

  bool empty() const { return tokens_.empty(); }
  /// Cuts a valid text. `special_allowed(range)` says whether a special token may stand there.
  template <class Allowed>
  std::vector<Stretch> split(std::string_view text, const Allowed& special_allowed) const {
    std::vector<Stretch> stretches;
    std::size_t done = 0;
    for (std::size_t at = 0; at < text.size();) {
      const AddedToken* token = longest_at(text, at);
      if (token == nullptr) {
        ++at;
        continue;
      }
      Range range{at, at + token->content.size()};
      at = range.end;
      if (token->special && !special_allowed(range)) continue;
      if (!fits(*token, text, range, done)) continue;
      if (range.begin > done) stretches.push_back({{done, range.begin}, -1});
      stretches.push_back({range, token->id});
      done = range.end;
      at = std::max(at, done);
    }
    if (done < text.size()) stretches.push_back({{done, text.size()}, -1});
    return stretches;
  }

 private:
  struct Node {
    std::map<char, std::uint32_t> children;
    std::int32_t token = -1;
  };
  const AddedToken* longest_at(std::string_view text, std::size_t at) const;
  /// Whether the token may stand at `range`, which grows over white space where the token wants that, not below `done`.
  static bool fits(const AddedToken& token, std::string_view text, Range& range, std::size_t done);

  std::vector<AddedToken> tokens_;
  std::vector<Node> nodes_;
};

}  // namespace tessera::model::text
