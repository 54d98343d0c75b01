#include "model/text/pre_tokenizer.h"

#include <algorithm>
#include <map>

#include "core/error.h"
#include "model/text/byte_characters.h"
#include "model/text/normalizer.h"
#include "model/text/unicode.h"

namespace tessera::model::text {

namespace {

constexpr std::string_view kSupported =
    "supported: Sequence, ByteLevel, Split, Metaspace, Whitespace, WhitespaceSplit, Digits, Punctuation, "
    "CharDelimiterSplit";

// The expressions are facts of the published tokenizers: text is cut as they cut it or the ids differ.
constexpr std::string_view kGpt2 = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
constexpr std::string_view kLlama3 =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr std::string_view kQwen2 =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr std::string_view kGpt4o =
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr std::string_view kTekken =
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

/// Alternately what lies between matches and matches, `invert` exchanging them.
struct Cut {
  Range range;
  bool is_match;
};

std::vector<Cut> cuts_of(const Pattern& pattern, std::string_view text, bool invert) {
  std::vector<Cut> cuts;
  std::size_t done = 0;
  for (const Range& match : pattern.find_all(text)) {
    if (match.begin > done) cuts.push_back({{done, match.begin}, invert});
    cuts.push_back({match, !invert});
    done = match.end;
  }
  if (done < text.size()) cuts.push_back({{done, text.size()}, invert});
  return cuts;
}

/// Ranges of `text` after its cuts were joined or dropped.
std::vector<Range> split(const Pattern& pattern, MatchUse use, bool invert, std::string_view text) {
  std::vector<Cut> cuts = cuts_of(pattern, text, invert);
  std::vector<Range> ranges;
  ranges.reserve(cuts.size());
  bool previous = false;
  switch (use) {
    case MatchUse::removed:
      for (const Cut& cut : cuts) {
        if (!cut.is_match) ranges.push_back(cut.range);
      }
      break;
    case MatchUse::isolated:
      for (const Cut& cut : cuts) ranges.push_back(cut.range);
      break;
    case MatchUse::contiguous:
    case MatchUse::with_previous:
      for (const Cut& cut : cuts) {
        const bool joins = use == MatchUse::contiguous ? cut.is_match == previous : cut.is_match && !previous;
        if (joins && !ranges.empty()) {
          ranges.back().end = cut.range.end;
        } else {
          ranges.push_back(cut.range);
        }
        previous = cut.is_match;
      }
      break;
    case MatchUse::with_next:
      std::reverse(cuts.begin(), cuts.end());
      for (const Cut& cut : cuts) {
        if (cut.is_match && !previous && !ranges.empty()) {
          ranges.back().begin = cut.range.begin;
        } else {
          ranges.push_back(cut.range);
        }
        previous = cut.is_match;
      }
      std::reverse(ranges.begin(), ranges.end());
      break;
  }
  return ranges;
}

void cut_words(Words& words, const Pattern& pattern, MatchUse use, bool invert) {
  std::vector<Range> ranges;
  for (const Range& word : words.ranges) {
    for (const Range& part :
         split(pattern, use, invert, std::string_view(words.text).substr(word.begin, word.end - word.begin))) {
      if (part.begin < part.end) ranges.push_back({word.begin + part.begin, word.begin + part.end});
    }
  }
  words.ranges = std::move(ranges);
}

/// Writes every word anew; `change` gets the word and whether it begins where the input began.
template <class Change>
void rewrite(Words& words, const Change& change) {
  std::string text;
  text.reserve(words.text.size() + words.text.size() / 4);
  for (Range& word : words.ranges) {
    const std::size_t begin = text.size();
    text += change(std::string_view(words.text).substr(word.begin, word.end - word.begin),
                   words.at_start && word.begin == 0);
    word = {begin, text.size()};
  }
  words.text = std::move(text);
}

void spell(Words& words) {
  rewrite(words, [](std::string_view word, bool) { return spelt_in_characters(word); });
}

MatchUse read_use(const Json& json, std::string_view name, const char* fallback) {
  static const std::map<std::string, MatchUse, std::less<>> uses{{"Removed", MatchUse::removed},
                                                                 {"Isolated", MatchUse::isolated},
                                                                 {"MergedWithPrevious", MatchUse::with_previous},
                                                                 {"MergedWithNext", MatchUse::with_next},
                                                                 {"Contiguous", MatchUse::contiguous}};
  const auto text = get_or<std::string>(json, "behavior", name, fallback);
  const auto found = uses.find(text);
  require(found != uses.end(),
          "{}: 'behavior' is '{}'; expected Removed, Isolated, MergedWithPrevious, MergedWithNext or Contiguous", name,
          text.substr(0, 60));
  return found->second;
}

/// Spaces as the replacement character, one before the text according to the scheme.
void metaspace(Words& words, const std::string& replacement, const std::string& scheme) {
  rewrite(words, [&](std::string_view word, bool first) {
    std::string text;
    for (const char c : word) {
      if (c == ' ') {
        text += replacement;
      } else {
        text += c;
      }
    }
    const bool wanted = scheme == "always" || (scheme == "first" && first);
    return wanted && !text.starts_with(replacement) ? replacement + text : text;
  });
}

}  // namespace

PreTokenizer PreTokenizer::read(const Json& json, std::string_view name) {
  PreTokenizer result;
  if (!json.is_null()) result.add(json, name, 0);
  return result;
}

PreTokenizer PreTokenizer::of_gguf(std::string_view pre, std::string_view name) {
  static const std::map<std::string_view, std::vector<std::string_view>> known{
      {"default", {R"([\p{P}\$\+<=>\^~\|]+)", kGpt2, R"(\p{N}+)", "[0-9][0-9][0-9]"}},
      {"gpt-2", {kGpt2}},
      {"gpt2", {kGpt2}},
      {"phi-2", {kGpt2}},
      {"olmo", {kGpt2}},
      {"smollm", {R"(\p{N})", kGpt2}},
      {"starcoder", {R"(\p{N})", kGpt2}},
      {"refact", {R"(\p{N})", kGpt2}},
      {"command-r", {R"(\p{N})", kGpt2}},
      {"llama3", {kLlama3}},
      {"llama-v3", {kLlama3}},
      {"llama-bpe", {kLlama3}},
      {"smaug-bpe", {kLlama3}},
      {"dbrx", {kLlama3}},
      {"qwen2", {kQwen2}},
      {"deepseek-r1-qwen", {kQwen2}},
      {"stablelm2", {kQwen2}},
      {"gpt-4o", {kGpt4o}},
      {"llama4", {kGpt4o}},
      {"tekken", {kTekken}},
  };
  const auto found = known.find(pre);
  if (found == known.end()) {
    std::vector<std::string_view> names(known.size());
    std::transform(known.begin(), known.end(), names.begin(), [](const auto& entry) { return entry.first; });
    fail("{}: 'tokenizer.ggml.pre' is '{}', which is not supported; supported: {}", name, pre.substr(0, 60),
         fmt::join(names, ", "));
  }
  PreTokenizer result;
  for (const std::string_view expression : found->second) {
    result.add_split(Pattern(expression, name), MatchUse::isolated);
  }
  result.steps_.emplace_back(spell);
  return result;
}

Words PreTokenizer::apply(std::string text, bool at_start) const {
  Words words{std::move(text), {}, at_start};
  if (!words.text.empty()) words.ranges.push_back({0, words.text.size()});
  const std::size_t before = words.text.size();
  for (const Step& step : steps_) {
    step(words);
    check_growth(before, words.text.size());
  }
  return words;
}

void PreTokenizer::add_split(const Pattern& pattern, MatchUse use, bool invert) {
  steps_.emplace_back([pattern, use, invert](Words& words) { cut_words(words, pattern, use, invert); });
}

void PreTokenizer::add(const Json& json, std::string_view name, int depth) {
  const auto type = get<std::string>(json, "type", name);
  if (type == "Sequence") {
    require(depth < 8, "{}: sequences are nested deeper than 8 levels", name);
    const auto parts = get<Json>(json, "pretokenizers", name);
    require(parts.is_array(), "{}: 'pretokenizers' is no list", name);
    for (const Json& part : parts) add(part, name, depth + 1);
  } else if (type == "ByteLevel") {
    if (get_or<bool>(json, "add_prefix_space", name, false)) {
      steps_.emplace_back([](Words& words) {
        rewrite(words, [](std::string_view word, bool) {
          return word.starts_with(' ') ? std::string(word) : fmt::format(" {}", word);
        });
      });
    }
    if (get_or<bool>(json, "use_regex", name, true)) add_split(Pattern(kGpt2, name), MatchUse::isolated);
    steps_.emplace_back(spell);
  } else if (type == "Split") {
    add_split(read_pattern(json, "pattern", name), read_use(json, name, "Isolated"),
              get_or<bool>(json, "invert", name, false));
  } else if (type == "Metaspace") {
    const auto replacement = get_or<std::string>(json, "replacement", name, "\xE2\x96\x81");
    require(!replacement.empty() && is_valid_utf8(replacement) && character_bytes(replacement[0]) == replacement.size(),
            "{}: 'replacement' is '{}'; expected one character", name, replacement.substr(0, 60));
    const bool old_prefix = get_or<bool>(json, "add_prefix_space", name, true);
    const auto scheme = get_or<std::string>(json, "prepend_scheme", name, old_prefix ? "always" : "never");
    require(scheme == "always" || scheme == "first" || scheme == "never",
            "{}: 'prepend_scheme' is '{}'; expected always, first or never", name, scheme.substr(0, 60));
    steps_.emplace_back([replacement, scheme](Words& words) { metaspace(words, replacement, scheme); });
    if (get_or<bool>(json, "split", name, true)) add_split(Pattern::literal(replacement, name), MatchUse::with_next);
  } else if (type == "Whitespace") {
    add_split(Pattern(R"([\w\p{Join_Control}]+|[^\w\s\p{Join_Control}]+)", name), MatchUse::removed, true);
  } else if (type == "WhitespaceSplit") {
    add_split(Pattern(R"(\s)", name), MatchUse::removed);
  } else if (type == "Digits") {
    const bool single = get_or<bool>(json, "individual_digits", name, false);
    add_split(Pattern(R"(\p{N})", name), single ? MatchUse::isolated : MatchUse::contiguous);
  } else if (type == "Punctuation") {
    add_split(Pattern(R"([\p{P}$+<=>^`|~])", name), read_use(json, name, "Isolated"));
  } else if (type == "CharDelimiterSplit") {
    add_split(Pattern::literal(get<std::string>(json, "delimiter", name), name), MatchUse::removed);
  } else {
    fail("{}: pre_tokenizer of type '{}' is not supported; {}", name, type.substr(0, 60), kSupported);
  }
}

}  // namespace tessera::model::text
