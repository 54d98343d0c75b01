#include "model/text/bpe.h"

#include <algorithm>
#include <limits>
#include <queue>

#include "core/error.h"
#include "model/text/byte_characters.h"
#include "model/text/unicode.h"

namespace tessera::model::text {

namespace {

/// A merge that may have become stale; the lowest rank first, the leftmost among equals.
struct Candidate {
  std::uint32_t rank;
  std::int32_t place;
  std::int32_t id;
  bool operator<(const Candidate& other) const { return rank != other.rank ? rank > other.rank : place > other.place; }
};

}  // namespace

std::vector<std::int32_t> byte_token_ids(const IdOfToken& ids) {
  std::vector<std::int32_t> result(256, -1);
  for (unsigned byte = 0; byte < 256; ++byte) {
    const auto found = ids.find(byte_name(static_cast<unsigned char>(byte)));
    if (found != ids.end()) result[byte] = found->second;
  }
  return result;
}

MergeTable::MergeTable(std::size_t expected) : mask_(15) {
  while (mask_ + 1 < 2 * expected) mask_ = 2 * mask_ + 1;
  keys_.assign(mask_ + 1, empty_key);
  merges_.resize(mask_ + 1);
}

void MergeTable::set(std::int32_t left, std::int32_t right, Merge merge) {
  if (2 * (used_ + 1) > mask_) {
    MergeTable larger(2 * (used_ + 1));
    for (std::size_t i = 0; i < keys_.size(); ++i) {
      if (keys_[i] == empty_key) continue;
      larger.set(static_cast<std::int32_t>(keys_[i] >> 32), static_cast<std::int32_t>(keys_[i]), merges_[i]);
    }
    *this = std::move(larger);
  }
  const std::uint64_t key = key_of(left, right);
  std::size_t place = place_of(key);
  while (keys_[place] != key && keys_[place] != empty_key) place = (place + 1) & mask_;
  if (keys_[place] == empty_key) ++used_;
  keys_[place] = key;
  merges_[place] = merge;
}

Bpe::Bpe(const IdOfToken& ids, MergeTable merges, BpeOptions options)
    : ids_(ids), merges_(std::move(merges)), options_(std::move(options)), byte_ids_(byte_token_ids(ids)) {}

void Bpe::encode(std::string_view word, std::vector<std::int32_t>& ids) const {
  if (options_.ignore_merges) {
    if (const auto found = ids_.find(word); found != ids_.end()) {
      ids.push_back(found->second);
      return;
    }
  }
  require(word.size() < static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max()),
          "a word of {} bytes is too long", word.size());
  std::vector<Symbol> symbols;
  add_characters(word, symbols);
  merge(symbols);
  for (const Symbol& symbol : symbols) {
    if (!symbol.merged) ids.push_back(symbol.id);
  }
}

void Bpe::add_characters(std::string_view word, std::vector<Symbol>& symbols) const {
  symbols.reserve(word.size());
  const auto add = [&](std::int32_t id) { symbols.push_back({id, -1, -1, false}); };
  bool unknown = false;  // waits for further ones to join
  std::string decorated;
  const bool plain = options_.continuing_subword_prefix.empty() && options_.end_of_word_suffix.empty();
  for (std::size_t begin = 0; begin < word.size();) {
    const std::size_t end = begin + character_bytes(word[begin]);
    std::string_view character = word.substr(begin, end - begin);
    if (!plain) {
      decorated = begin > 0 ? options_.continuing_subword_prefix : std::string();
      decorated += character;
      if (end == word.size()) decorated += options_.end_of_word_suffix;
      character = decorated;
    }
    begin = end;
    if (const auto found = ids_.find(character); found != ids_.end()) {
      if (unknown) add(*options_.unknown);
      unknown = false;
      add(found->second);
      continue;
    }
    const auto has_token = [&](char c) { return byte_ids_[static_cast<unsigned char>(c)] >= 0; };
    if (options_.byte_fallback && std::all_of(character.begin(), character.end(), has_token)) {
      for (const char c : character) add(byte_ids_[static_cast<unsigned char>(c)]);
      continue;
    }
    if (!options_.unknown) continue;
    if (unknown && !options_.fuse_unknown) add(*options_.unknown);
    unknown = true;
  }
  if (unknown) add(*options_.unknown);
}

void Bpe::merge(std::vector<Symbol>& symbols) const {
  const auto count = static_cast<std::int32_t>(symbols.size());
  const auto at = [&](std::int32_t place) -> Symbol& { return symbols[static_cast<std::size_t>(place)]; };
  std::vector<Candidate> candidates;
  for (std::int32_t i = 0; i < count; ++i) {
    at(i).previous = i - 1;
    at(i).next = i + 1 < count ? i + 1 : -1;
    if (i + 1 == count) break;
    if (const auto* found = merges_.find(at(i).id, at(i + 1).id)) candidates.push_back({found->rank, i, found->id});
  }
  std::priority_queue<Candidate> queue(std::less<Candidate>(), std::move(candidates));
  const auto consider = [&](std::int32_t left) {
    if (left < 0 || at(left).next < 0) return;
    if (const auto* found = merges_.find(at(left).id, at(at(left).next).id)) {
      queue.push({found->rank, left, found->id});
    }
  };
  while (!queue.empty()) {
    const Candidate top = queue.top();
    queue.pop();
    Symbol& left = at(top.place);
    if (left.merged || left.next < 0) continue;
    Symbol& right = at(left.next);
    const auto* current = merges_.find(left.id, right.id);
    if (current == nullptr || current->id != top.id) continue;  // the pair is another one by now
    left.id = top.id;
    left.next = right.next;
    right.merged = true;
    if (right.next >= 0) at(right.next).previous = top.place;
    consider(left.previous);
    consider(top.place);
  }
}

MergeTable merges_of_scores(std::span<const std::string> tokens, const IdOfToken& ids, std::span<const float> scores,
                            const std::vector<bool>& mergeable) {
  // Ranks by score: equal scores have equal ranks, so that the place decides.
  std::vector<float> order(scores.begin(), scores.end());
  std::sort(order.begin(), order.end(), std::greater<>());
  order.erase(std::unique(order.begin(), order.end()), order.end());
  MergeTable merges(tokens.size() * 2);
  for (std::size_t id = 0; id < tokens.size(); ++id) {
    const std::string_view token = tokens[id];
    if (!mergeable[id] || token.size() < 2 || !is_valid_utf8(token)) continue;
    const auto rank = static_cast<std::uint32_t>(
        std::lower_bound(order.begin(), order.end(), scores[id], std::greater<>()) - order.begin());
    for (std::size_t cut = character_bytes(token[0]); cut < token.size(); cut += character_bytes(token[cut])) {
      const auto left = ids.find(token.substr(0, cut));
      if (left == ids.end() || !mergeable[static_cast<std::size_t>(left->second)]) continue;
      const auto right = ids.find(token.substr(cut));
      if (right == ids.end() || !mergeable[static_cast<std::size_t>(right->second)]) continue;
      merges.set(left->second, right->second, {rank, static_cast<std::int32_t>(id)});
    }
  }
  return merges;
}

}  // namespace tessera::model::text
