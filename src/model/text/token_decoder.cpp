#include "model/text/token_decoder.h"

#include "core/error.h"
#include "model/text/byte_characters.h"
#include "model/text/normalizer.h"
#include "model/text/unicode.h"

namespace tessera::model::text {

namespace {

constexpr std::string_view kSupported = "supported: Sequence, ByteLevel, Metaspace, Replace, ByteFallback, Fuse, Strip";
constexpr std::string_view kSpace = "\xE2\x96\x81";

void from_characters(std::vector<std::string>& tokens, bool) {
  for (std::string& token : tokens) {
    if (auto bytes = spelt_bytes(token)) token = *std::move(bytes);
  }
}

void fuse(std::vector<std::string>& tokens, bool) {
  std::string all;
  for (const std::string& token : tokens) all += token;
  tokens.assign(1, all);
}

void from_byte_names(std::vector<std::string>& tokens, bool) {
  for (std::string& token : tokens) {
    if (const auto byte = named_byte(token)) token.assign(1, static_cast<char>(*byte));
  }
}

/// Up to `count` times `content` from one end of a token.
void strip(std::string& token, const std::string& content, std::int64_t start, std::int64_t stop) {
  for (std::int64_t i = 0; i < start && token.starts_with(content); ++i) token.erase(0, content.size());
  for (std::int64_t i = 0; i < stop && token.ends_with(content); ++i) token.resize(token.size() - content.size());
}

void replace_in(std::string& token, std::string_view from, std::string_view to) {
  std::string out;
  for (std::size_t at = 0; at < token.size();) {
    const bool found = std::string_view(token).substr(at).starts_with(from);
    out += found ? to : std::string_view(token).substr(at, 1);
    at += found ? from.size() : 1;
  }
  token = std::move(out);
}

}  // namespace

TokenDecoder TokenDecoder::read(const Json& json, std::string_view name) {
  TokenDecoder decoder;
  if (!json.is_null()) decoder.add(json, name, 0);
  return decoder;
}

TokenDecoder TokenDecoder::byte_level() {
  TokenDecoder decoder;
  decoder.steps_.emplace_back(from_characters);
  return decoder;
}

TokenDecoder TokenDecoder::sentencepiece(bool prefix) {
  TokenDecoder decoder;
  decoder.steps_.emplace_back([](std::vector<std::string>& tokens, bool) {
    for (std::string& token : tokens) replace_in(token, kSpace, " ");
  });
  decoder.steps_.emplace_back(from_byte_names);
  decoder.steps_.emplace_back(fuse);
  decoder.steps_.emplace_back([prefix](std::vector<std::string>& tokens, bool continues) {
    if (prefix && !continues) strip(tokens[0], " ", 1, 0);
  });
  return decoder;
}

std::string TokenDecoder::apply(std::vector<std::string> tokens, bool continues) const {
  if (tokens.empty()) return {};
  const auto size = [&] {
    std::size_t bytes = 0;
    for (const std::string& token : tokens) bytes += token.size();
    return bytes;
  };
  const std::size_t before = size();
  for (const Step& step : steps_) {
    step(tokens, continues);
    check_growth(before, size());
  }
  fuse(tokens, continues);
  return std::move(tokens[0]);
}

void TokenDecoder::add(const Json& json, std::string_view name, int depth) {
  const auto type = get<std::string>(json, "type", name);
  if (type == "Sequence") {
    require(depth < 8, "{}: sequences are nested deeper than 8 levels", name);
    const auto parts = get<Json>(json, "decoders", name);
    require(parts.is_array(), "{}: 'decoders' is no list", name);
    for (const Json& part : parts) add(part, name, depth + 1);
  } else if (type == "ByteLevel") {
    steps_.emplace_back(from_characters);
  } else if (type == "ByteFallback") {
    steps_.emplace_back(from_byte_names);
  } else if (type == "Fuse") {
    steps_.emplace_back(fuse);
  } else if (type == "Metaspace") {
    const auto replacement = get_or<std::string>(json, "replacement", name, std::string(kSpace));
    require(!replacement.empty(), "{}: 'replacement' is empty", name);
    const bool old_prefix = get_or<bool>(json, "add_prefix_space", name, true);
    const auto scheme = get_or<std::string>(json, "prepend_scheme", name, old_prefix ? "always" : "never");
    const bool prefix = scheme != "never";
    steps_.emplace_back([replacement, prefix](std::vector<std::string>& tokens, bool continues) {
      for (std::size_t i = 0; i < tokens.size(); ++i) {
        replace_in(tokens[i], replacement, i == 0 && prefix && !continues ? "" : " ");
      }
    });
  } else if (type == "Replace") {
    const Pattern pattern = read_pattern(json, "pattern", name);
    const auto content = get<std::string>(json, "content", name);
    steps_.emplace_back([pattern, content](std::vector<std::string>& tokens, bool) {
      for (std::string& token : tokens) {
        if (is_valid_utf8(token)) token = replace_all(pattern, content, token);
      }
    });
  } else if (type == "Strip") {
    const auto content = get<std::string>(json, "content", name);
    const auto start = get_or<std::int64_t>(json, "start", name, 0);
    const auto stop = get_or<std::int64_t>(json, "stop", name, 0);
    require(!content.empty() && start >= 0 && stop >= 0,
            "{}: Strip of '{}', {} at the start and {} at the end; expected a character and counts from 0 on", name,
            content.substr(0, 60), start, stop);
    steps_.emplace_back([content, start, stop](std::vector<std::string>& tokens, bool continues) {
      if (continues) return;  // a stream does not know its ends
      for (std::string& token : tokens) strip(token, content, start, stop);
    });
  } else {
    fail("{}: decoder of type '{}' is not supported; {}", name, type.substr(0, 60), kSupported);
  }
}

}  // namespace tessera::model::text
