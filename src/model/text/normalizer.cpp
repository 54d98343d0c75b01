#include "model/text/normalizer.h"

#include <memory>

#include "core/error.h"
#include "model/text/byte_characters.h"
#include "model/text/charsmap.h"
#include "model/text/unicode.h"

namespace tessera::model::text {

namespace {

constexpr std::string_view kSupported =
    "supported: Sequence, NFC, NFD, NFKC, NFKD, Lowercase, Strip, StripAccents, Replace, Prepend, Nmt, Precompiled, "
    "ByteLevel";

template <class Keep>
std::string filtered(const std::string& text, const Keep& keep) {
  std::string out;
  for (std::string_view rest = text; !rest.empty();) {
    const CodePoint c = first_code_point(rest);
    if (keep(c.value)) out += rest.substr(0, c.bytes);
    rest.remove_prefix(c.bytes);
  }
  return out;
}

std::string stripped(std::string_view text, bool left, bool right) {
  while (left && !text.empty()) {
    const CodePoint c = first_code_point(text);
    if (!is_white_space(c.value)) break;
    text.remove_prefix(c.bytes);
  }
  while (right && !text.empty()) {
    std::size_t last = text.size() - 1;
    while ((static_cast<unsigned char>(text[last]) & 0xC0) == 0x80) --last;
    if (!is_white_space(first_code_point(text.substr(last)).value)) break;
    text = text.substr(0, last);
  }
  return std::string(text);
}

/// The rules of nmt_nfkc before the normal form: control characters go, odd spaces become spaces.
std::string nmt(const std::string& text) {
  std::string out;
  for (std::string_view rest = text; !rest.empty();) {
    const CodePoint c = first_code_point(rest);
    const char32_t v = c.value;
    const bool dropped =
        (v >= 0x1 && v <= 0x8) || v == 0xB || (v >= 0xE && v <= 0x1F) || v == 0x7F || v == 0x8F || v == 0x9F;
    const bool space = v == 0x9 || v == 0xA || v == 0xC || v == 0xD || v == 0x1680 || (v >= 0x200B && v <= 0x200F) ||
                       v == 0x2028 || v == 0x2029 || v == 0x2581 || v == 0xFEFF || v == 0xFFFD;
    if (space) {
      out += ' ';
    } else if (!dropped) {
      out += rest.substr(0, c.bytes);
    }
    rest.remove_prefix(c.bytes);
  }
  return out;
}

}  // namespace

Pattern read_pattern(const Json& object, std::string_view key, std::string_view name) {
  const auto pattern = get<Json>(object, key, name);
  const std::string where = fmt::format("{}: '{}'", name, key);
  if (pattern.is_string()) return Pattern::literal(pattern.get<std::string>(), where);  // as early files have it
  if (const auto text = get_optional<std::string>(pattern, "String", where)) return Pattern::literal(*text, where);
  return {get<std::string>(pattern, "Regex", where), where};
}

void check_growth(std::size_t before, std::size_t after) {
  require(after <= largest_text(before), "the tokenizer makes a text of {} bytes longer than {} bytes", before,
          largest_text(before));
}

std::string replace_all(const Pattern& pattern, std::string_view replacement, std::string_view text) {
  std::string out;
  std::size_t done = 0;
  for (const Range& match : pattern.find_all(text)) {
    out += text.substr(done, match.begin - done);
    out += replacement;
    check_growth(text.size(), out.size());
    done = match.end;
  }
  out += text.substr(done);
  return out;
}

Normalizer Normalizer::read(const Json& json, std::string_view name) {
  Normalizer normalizer;
  if (!json.is_null()) normalizer.add(json, name, 0);
  return normalizer;
}

Normalizer Normalizer::sentencepiece(bool prefix) {
  Normalizer normalizer;
  const Pattern space = Pattern::literal(" ", "spaces");
  normalizer.steps_.emplace_back([space, prefix](const std::string& text) {
    const std::string spaced = replace_all(space, "\xE2\x96\x81", text);
    return prefix && !text.empty() ? fmt::format("\xE2\x96\x81{}", spaced) : spaced;
  });
  return normalizer;
}

std::string Normalizer::apply(std::string text) const {
  const std::size_t before = text.size();
  for (const Step& step : steps_) {
    text = step(std::move(text));
    check_growth(before, text.size());
  }
  return text;
}

void Normalizer::add(const Json& json, std::string_view name, int depth) {
  const auto type = get<std::string>(json, "type", name);
  const auto form = [&](NormalForm wanted) {
    steps_.emplace_back([wanted](const std::string& text) { return normal_form(text, wanted); });
  };
  if (type == "Sequence") {
    require(depth < 8, "{}: sequences are nested deeper than 8 levels", name);
    const auto parts = get<Json>(json, "normalizers", name);
    require(parts.is_array(), "{}: 'normalizers' is no list", name);
    for (const Json& part : parts) add(part, name, depth + 1);
  } else if (type == "NFC") {
    form(NormalForm::nfc);
  } else if (type == "NFD") {
    form(NormalForm::nfd);
  } else if (type == "NFKC") {
    form(NormalForm::nfkc);
  } else if (type == "NFKD") {
    form(NormalForm::nfkd);
  } else if (type == "Lowercase") {
    steps_.emplace_back([](const std::string& text) { return lower_case(text); });
  } else if (type == "Strip") {
    const bool left = get_or<bool>(json, "strip_left", name, true);
    const bool right = get_or<bool>(json, "strip_right", name, true);
    steps_.emplace_back([left, right](const std::string& text) { return stripped(text, left, right); });
  } else if (type == "StripAccents") {
    steps_.emplace_back([](const std::string& text) { return filtered(text, [](char32_t c) { return !is_mark(c); }); });
  } else if (type == "Replace") {
    const Pattern pattern = read_pattern(json, "pattern", name);
    const auto content = get<std::string>(json, "content", name);
    require(is_valid_utf8(content), "{}: 'content' is not valid UTF-8", name);
    steps_.emplace_back([pattern, content](const std::string& text) { return replace_all(pattern, content, text); });
  } else if (type == "Prepend") {
    const auto prefix = get<std::string>(json, "prepend", name);
    steps_.emplace_back([prefix](std::string text) { return text.empty() ? std::move(text) : prefix + text; });
  } else if (type == "Nmt") {
    steps_.emplace_back(nmt);
  } else if (type == "Precompiled") {
    const auto map = std::make_shared<const CharacterMap>(get<std::string>(json, "precompiled_charsmap", name), name);
    steps_.emplace_back([map](const std::string& text) { return map->apply(text); });
  } else if (type == "ByteLevel") {
    steps_.emplace_back([](const std::string& text) { return spelt_in_characters(text); });
  } else {
    fail("{}: normalizer of type '{}' is not supported; {}", name, type.substr(0, 60), kSupported);
  }
}

}  // namespace tessera::model::text
