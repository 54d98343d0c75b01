#include "model/tokenizer.h"

#include <algorithm>
#include <unordered_map>

#include "core/error.h"
#include "model/text/unicode.h"
#include "model/tokenizer_parts.h"

namespace tessera::model {

namespace {

/// Words longer than this are not remembered: they hardly come again.
constexpr std::size_t kLongestRemembered = 64;

using Ids = std::vector<std::int32_t>;

void encode_words(const text::Words& words, const text::WordModel& model, Ids& ids) {
  std::unordered_map<std::string_view, text::Range> known;  // where the ids of a word stand
  for (const text::Range& range : words.ranges) {
    const std::string_view word = std::string_view(words.text).substr(range.begin, range.end - range.begin);
    if (word.empty()) continue;
    if (word.size() > kLongestRemembered) {
      model.encode(word, ids);
      continue;
    }
    const auto [found, fresh] = known.try_emplace(word, text::Range{ids.size(), ids.size()});
    if (fresh) {
      model.encode(word, ids);
      found->second.end = ids.size();
    } else {
      for (std::size_t i = found->second.begin; i < found->second.end; ++i) {
        const std::int32_t id = ids[i];  // push_back may move what it would refer to
        ids.push_back(id);
      }
    }
  }
}

void encode_text(const Tokenizer::Parts& parts, std::string text, bool at_start, bool markup, Ids& ids) {
  text = parts.normalizer.apply(std::move(text));
  const auto allowed = [&](text::Range) { return markup; };
  for (const text::Stretch& stretch : parts.normalized_names.split(text, allowed)) {
    if (stretch.token >= 0) {
      ids.push_back(stretch.token);
      continue;
    }
    const text::Range range = stretch.range;
    encode_words(
        parts.pre_tokenizer.apply(text.substr(range.begin, range.end - range.begin), at_start && range.begin == 0),
        *parts.model, ids);
  }
}

void encode_bytes(const Tokenizer::Parts& parts, std::string_view text, std::size_t offset, Ids& ids) {
  for (std::size_t i = 0; i < text.size(); ++i) {
    const auto byte = static_cast<unsigned char>(text[i]);
    const std::int32_t id = (*parts.id_of_byte)[byte];
    require(id >= 0, "the vocabulary has no token for byte 0x{:02x} at offset {} of the text", byte, offset + i);
    ids.push_back(id);
  }
}

}  // namespace

void Tokenizer::Parts::place(std::int32_t id, std::string token, Kind kind) {
  const auto at = static_cast<std::size_t>(id);
  if (tokens.size() <= at) {
    tokens.resize(at + 1);
    kinds.resize(at + 1, Kind::unused);
  }
  tokens[at] = std::move(token);
  kinds[at] = kind;
}

void Tokenizer::Parts::finish() {
  std::vector<text::AddedToken> raw;
  std::vector<text::AddedToken> normalized;
  for (text::AddedToken token : added) {
    if (!token.normalized || id_of_byte) {
      raw.push_back(std::move(token));
      continue;
    }
    token.content = normalizer.apply(std::move(token.content));
    tokens[static_cast<std::size_t>(token.id)] = token.content;  // what the package `tokenizers` decodes them to
    normalized.push_back(std::move(token));
  }
  // Special tokens come first where two have one content.
  const auto special = [](const text::AddedToken& token) { return token.special; };
  std::stable_partition(raw.begin(), raw.end(), special);
  std::stable_partition(normalized.begin(), normalized.end(), special);
  raw_names = text::AddedTokenFinder(raw);
  normalized_names = text::AddedTokenFinder(normalized);
  bytes.resize(tokens.size());
  for (std::size_t id = 0; id < tokens.size(); ++id) {
    if (kinds[id] == Kind::text) bytes[id] = decoder.apply({tokens[id]}, /*continues=*/true);
  }
}

Tokenizer Tokenizer::of_bytes() {
  auto parts = std::make_shared<Parts>();
  parts->id_of_byte.emplace();
  for (std::int32_t byte = 0; byte < 256; ++byte) {
    (*parts->id_of_byte)[static_cast<std::size_t>(byte)] = byte;
    parts->place(byte, std::string(1, static_cast<char>(byte)), Parts::Kind::text);
  }
  parts->finish();
  return Tokenizer(std::move(parts));
}

std::vector<std::int32_t> Tokenizer::encode(std::string_view text, bool special_names) const {
  const TextPart part{std::string(text), special_names};
  return encode({&part, 1});
}

std::vector<std::int32_t> Tokenizer::encode(std::span<const TextPart> parts) const {
  std::string text;
  std::vector<text::Range> markup;
  for (const TextPart& part : parts) {
    const std::size_t begin = text.size();
    text += parts_->id_of_byte ? part.text : text::replace_invalid(part.text);
    if (!part.markup) continue;
    if (!markup.empty() && markup.back().end == begin) {
      markup.back().end = text.size();
    } else {
      markup.push_back({begin, text.size()});
    }
  }
  const auto allowed = [&](text::Range range) {
    return std::any_of(markup.begin(), markup.end(),
                       [&](text::Range stretch) { return stretch.begin <= range.begin && range.end <= stretch.end; });
  };
  Ids ids;
  ids.reserve(text.size() / 3);
  for (const text::Stretch& stretch : parts_->raw_names.split(text, allowed)) {
    const text::Range range = stretch.range;
    const std::string_view piece = std::string_view(text).substr(range.begin, range.end - range.begin);
    if (stretch.token >= 0) {
      ids.push_back(stretch.token);
    } else if (parts_->id_of_byte) {
      encode_bytes(*parts_, piece, range.begin, ids);
    } else {
      encode_text(*parts_, std::string(piece), range.begin == 0, allowed(range), ids);
    }
  }
  return ids;
}

std::string_view Tokenizer::bytes_of(std::int32_t token) const {
  if (token < 0 || token >= static_cast<std::int64_t>(parts_->bytes.size())) return {};
  return parts_->bytes[static_cast<std::size_t>(token)];
}

std::string_view Tokenizer::name_of(std::int32_t token) const {
  if (token < 0 || token >= static_cast<std::int64_t>(parts_->tokens.size())) return {};
  return parts_->tokens[static_cast<std::size_t>(token)];
}

std::string Tokenizer::decode(std::span<const std::int32_t> tokens) const {
  std::vector<std::string> names;
  for (const std::int32_t token : tokens) {
    const auto at = static_cast<std::size_t>(token);
    if (token >= 0 && at < parts_->tokens.size() && parts_->kinds[at] == Parts::Kind::text) {
      names.push_back(parts_->tokens[at]);
    }
  }
  return parts_->decoder.apply(std::move(names), /*continues=*/false);
}

std::optional<std::int32_t> Tokenizer::id_of(std::string_view token) const {
  for (const text::AddedToken& added : parts_->added) {
    if (added.content == token) return added.id;
  }
  const auto found = parts_->ids.find(token);
  if (found == parts_->ids.end()) return std::nullopt;
  return found->second;
}

}  // namespace tessera::model
