#include "model/text/added_tokens.h"

#include <algorithm>

#include "model/text/unicode.h"

namespace tessera::model::text {

namespace {

std::size_t last_character(std::string_view text) {
  std::size_t last = text.size() - 1;
  while (last > 0 && (static_cast<unsigned char>(text[last]) & 0xC0) == 0x80) --last;
  return last;
}

}  // namespace

AddedTokenFinder::AddedTokenFinder(std::span<const AddedToken> tokens) : nodes_(1) {
  for (const AddedToken& token : tokens) {
    if (token.content.empty()) continue;
    std::uint32_t node = 0;
    for (const char c : token.content) {
      const auto [child, fresh] = nodes_[node].children.emplace(c, static_cast<std::uint32_t>(nodes_.size()));
      node = child->second;
      if (fresh) nodes_.emplace_back();
    }
    // Among equals, as tokens that are equal once normalised, the first counts.
    if (nodes_[node].token >= 0) continue;
    nodes_[node].token = static_cast<std::int32_t>(tokens_.size());
    tokens_.push_back(token);
  }
}

const AddedToken* AddedTokenFinder::longest_at(std::string_view text, std::size_t at) const {
  std::uint32_t node = 0;
  std::int32_t longest = -1;
  for (; at < text.size(); ++at) {
    const auto child = nodes_[node].children.find(text[at]);
    if (child == nodes_[node].children.end()) break;
    node = child->second;
    if (nodes_[node].token >= 0) longest = nodes_[node].token;
  }
  return longest < 0 ? nullptr : &tokens_[static_cast<std::size_t>(longest)];
}

bool AddedTokenFinder::fits(const AddedToken& token, std::string_view text, Range& range, std::size_t done) {
  if (token.single_word) {
    const std::string_view before = text.substr(0, range.begin);
    const std::string_view behind = text.substr(range.end);
    if (!before.empty() && is_word_character(first_code_point(before.substr(last_character(before))).value)) {
      return false;
    }
    if (!behind.empty() && is_word_character(first_code_point(behind).value)) return false;
  }
  if (token.lstrip) {
    while (range.begin > done) {
      const std::size_t last = last_character(text.substr(0, range.begin));
      if (last < done || !is_white_space(first_code_point(text.substr(last)).value)) break;
      range.begin = last;
    }
  }
  if (token.rstrip) {
    while (range.end < text.size()) {
      const CodePoint next = first_code_point(text.substr(range.end));
      if (!is_white_space(next.value)) break;
      range.end += next.bytes;
    }
  }
  return true;
}

}  // namespace tessera::model::text
