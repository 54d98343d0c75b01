// Regular expressions as tokenizer files write them.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace tessera::model::text {

/// A stretch of a text, in bytes.
struct Range {
  std::size_t begin;
  std::size_t end;
};

/// A compiled pattern over UTF-8 with Unicode properties. Immutable and thread-safe.
class Pattern {
 public:
  /// A regular expression. The dialect of tokenizer files is Oniguruma's (Ruby): \s is White_Space, \w covers marks and
  /// connectors, ^ and $ match at every line. `name` stands for the pattern in messages. Throws Error for what PCRE2
  /// cannot compile and for set operations in classes, which it lacks.
  Pattern(std::string_view expression, std::string_view name);
  /// A text that stands for itself.
  static Pattern literal(std::string_view text, std::string_view name);

  /// The matches in a valid text, in order, without overlap. Throws Error when one needs too many steps.
  std::vector<Range> find_all(std::string_view text) const;

 private:
  struct Code;
  std::shared_ptr<const Code> code_;
};

}  // namespace tessera::model::text
