#include "model/text/pattern.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <array>
#include <cctype>

#include "core/error.h"
#include "model/text/unicode.h"

namespace tessera::model::text {

namespace {

// \s and \w of PCRE2 differ from Oniguruma's in a few characters.
constexpr std::string_view kWhiteSpace =
    "\\x{9}-\\x{d}\\x{20}\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}";
constexpr std::string_view kWord = "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}";

constexpr std::size_t kLongestExpression = 1 << 16;
constexpr std::uint32_t kMostSteps = 10'000'000;

std::string translated(std::string_view expression, std::string_view name) {
  std::string out;
  bool in_class = false;
  for (std::size_t i = 0; i < expression.size(); ++i) {
    const char c = expression[i];
    if (c == '\\' && i + 1 < expression.size()) {
      const char next = expression[++i];
      const std::string_view set = next == 's' || next == 'S' ? kWhiteSpace : kWord;
      if (next == 's' || next == 'w') {
        out += in_class ? std::string(set) : fmt::format("[{}]", set);
      } else if ((next == 'S' || next == 'W') && !in_class) {
        out += fmt::format("[^{}]", set);
      } else {
        out += c;
        out += next;
      }
      continue;
    }
    if (in_class) {
      const bool posix = c == '[' && i + 1 < expression.size() && expression[i + 1] == ':';
      const bool set_operation = (c == '[' && !posix) || expression.substr(i, 2) == "&&";
      require(!set_operation, "{}: sets within a character class are not supported, in the pattern '{}'", name,
              expression.substr(0, 200));
      if (posix) {
        const std::size_t end = expression.find(":]", i + 2);
        if (end != std::string_view::npos) {
          out += expression.substr(i, end + 2 - i);
          i = end + 1;
          continue;
        }
      }
      if (c == ']') in_class = false;
    } else if (c == '[') {
      in_class = true;
      out += c;
      if (i + 1 < expression.size() && expression[i + 1] == '^') out += expression[++i];
      // A bracket right after the opening one stands for itself.
      if (i + 1 < expression.size() && expression[i + 1] == ']') {
        out += "\\]";
        ++i;
      }
      continue;
    }
    out += c;
  }
  return out;
}

struct Release {
  void operator()(pcre2_code* code) const { pcre2_code_free(code); }
  void operator()(pcre2_match_data* data) const { pcre2_match_data_free(data); }
  void operator()(pcre2_match_context* context) const { pcre2_match_context_free(context); }
  void operator()(pcre2_compile_context* context) const { pcre2_compile_context_free(context); }
};

std::string message_of(int error) {
  std::array<PCRE2_UCHAR, 256> buffer{};
  pcre2_get_error_message(error, buffer.data(), buffer.size());
  return reinterpret_cast<const char*>(buffer.data());
}

}  // namespace

struct Pattern::Code {
  std::unique_ptr<pcre2_code, Release> code;
  std::string name;
};

Pattern::Pattern(std::string_view expression, std::string_view name) {
  require(expression.size() <= kLongestExpression, "{}: a pattern of {} bytes is too long; expected at most {}", name,
          expression.size(), kLongestExpression);
  require(is_valid_utf8(expression), "{}: a pattern is not valid UTF-8", name);
  const std::string text = translated(expression, name);
  int error = 0;
  PCRE2_SIZE place = 0;
  const std::unique_ptr<pcre2_compile_context, Release> context(pcre2_compile_context_create(nullptr));
  pcre2_set_parens_nest_limit(context.get(), 64);
  auto code = std::make_shared<Code>();
  code->name = name;
  code->code.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(),
                                 PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C, &error, &place,
                                 context.get()));
  require(code->code != nullptr, "{}: the pattern '{}' cannot be read: {}", name, expression.substr(0, 200),
          message_of(error));
  pcre2_jit_compile(code->code.get(), PCRE2_JIT_COMPLETE);  // where there is no JIT the interpreter does it
  code_ = std::move(code);
}

Pattern Pattern::literal(std::string_view text, std::string_view name) {
  std::string expression;
  for (const char c : text) {
    if (static_cast<unsigned char>(c) < 0x80 && std::isalnum(static_cast<unsigned char>(c)) == 0) expression += '\\';
    expression += c;
  }
  return {expression, name};
}

std::vector<Range> Pattern::find_all(std::string_view text) const {
  std::vector<Range> matches;
  const std::unique_ptr<pcre2_match_data, Release> data(
      pcre2_match_data_create_from_pattern(code_->code.get(), nullptr));
  const std::unique_ptr<pcre2_match_context, Release> context(pcre2_match_context_create(nullptr));
  pcre2_set_match_limit(context.get(), kMostSteps);
  std::uint32_t options = PCRE2_NO_UTF_CHECK;
  for (std::size_t at = 0; at <= text.size();) {
    int found = pcre2_match(code_->code.get(), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), at, options,
                            data.get(), context.get());
    if (found == PCRE2_ERROR_JIT_STACKLIMIT) {  // the interpreter's stack is the heap
      options |= PCRE2_NO_JIT;
      continue;
    }
    if (found == PCRE2_ERROR_NOMATCH) break;
    require(found >= 0, "{}: matching a pattern at byte {} of the text failed: {}", code_->name, at, message_of(found));
    const PCRE2_SIZE* ends = pcre2_get_ovector_pointer(data.get());
    const Range match{ends[0], ends[1]};
    // \K in a lookahead can put the start behind the end.
    require(match.begin <= match.end && match.begin >= at, "{}: a pattern matches backwards, which is not supported",
            code_->name);
    matches.push_back(match);
    at = match.end;
    if (match.begin == match.end) {
      if (at == text.size()) break;
      at += character_bytes(text[at]);
    }
  }
  return matches;
}

}  // namespace tessera::model::text
