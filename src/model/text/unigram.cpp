#include "model/text/unigram.h"

#include <algorithm>
#include <deque>

#include "core/error.h"
#include "model/text/unicode.h"

namespace tessera::model::text {

namespace {
constexpr double kUnknownPenalty = 10;
}

Unigram::Unigram(std::span<const std::string> pieces, std::vector<double> scores, std::optional<std::int32_t> unknown,
                 bool byte_fallback, const IdOfToken& ids)
    : scores_(std::move(scores)),
      unknown_(unknown),
      byte_fallback_(byte_fallback),
      ids_(ids),
      byte_ids_(byte_token_ids(ids)) {
  if (!scores_.empty()) unknown_score_ = *std::min_element(scores_.begin(), scores_.end()) - kUnknownPenalty;
  std::vector<std::pair<std::string_view, std::int32_t>> sorted;
  sorted.reserve(pieces.size());
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    if (!pieces[i].empty()) sorted.emplace_back(pieces[i], static_cast<std::int32_t>(i));
  }
  // Of a piece that is there twice the last counts.
  std::sort(sorted.begin(), sorted.end(),
            [](const auto& a, const auto& b) { return a.first != b.first ? a.first < b.first : a.second > b.second; });
  sorted.erase(
      std::unique(sorted.begin(), sorted.end(), [](const auto& a, const auto& b) { return a.first == b.first; }),
      sorted.end());
  build(sorted);
}

void Unigram::build(std::span<const std::pair<std::string_view, std::int32_t>> sorted) {
  struct Job {
    std::uint32_t node;
    std::size_t begin, end, depth;  // pieces that share `depth` bytes
  };
  nodes_.emplace_back();
  labels_.push_back(0);
  std::deque<Job> jobs{{0, 0, sorted.size(), 0}};
  while (!jobs.empty()) {
    const Job job = jobs.front();
    jobs.pop_front();
    std::size_t at = job.begin;
    if (at < job.end && sorted[at].first.size() == job.depth) nodes_[job.node].piece = sorted[at++].second;
    nodes_[job.node].first_child = static_cast<std::uint32_t>(nodes_.size());
    while (at < job.end) {
      const char byte = sorted[at].first[job.depth];
      std::size_t end = at;
      while (end < job.end && sorted[end].first[job.depth] == byte) ++end;
      jobs.push_back({static_cast<std::uint32_t>(nodes_.size()), at, end, job.depth + 1});
      nodes_.emplace_back();
      labels_.push_back(static_cast<unsigned char>(byte));
      ++nodes_[job.node].children;
      at = end;
    }
  }
}

void Unigram::encode(std::string_view word, std::vector<std::int32_t>& ids) const {
  struct Best {
    double score = 0;
    std::int64_t begin = -1;  ///< of the piece that ends here
    std::int32_t piece = -1;  ///< -1: unknown
  };
  std::vector<Best> best(word.size() + 1);
  const auto offer = [&](std::size_t begin, std::size_t end, double score, std::int32_t piece) {
    Best& place = best[end];
    const double total = score + best[begin].score;
    if (place.begin < 0 || total > place.score) place = {total, static_cast<std::int64_t>(begin), piece};
  };
  for (std::size_t begin = 0; begin < word.size();) {
    const std::size_t character = character_bytes(word[begin]);
    bool known = false;
    std::uint32_t node = 0;
    for (std::size_t end = begin; end < word.size();) {
      const auto byte = static_cast<unsigned char>(word[end]);
      const auto first = labels_.begin() + nodes_[node].first_child;
      const auto last = first + nodes_[node].children;
      const auto child = std::lower_bound(first, last, byte);
      if (child == last || *child != byte) break;
      node = static_cast<std::uint32_t>(child - labels_.begin());
      ++end;
      if (nodes_[node].piece < 0) continue;
      offer(begin, end, scores_[static_cast<std::size_t>(nodes_[node].piece)], nodes_[node].piece);
      known = known || end - begin == character;
    }
    if (!known) offer(begin, begin + character, unknown_score_, -1);
    begin += character;
  }
  std::vector<std::pair<std::string_view, bool>> pieces;  // from the end of the word
  for (std::size_t end = word.size(); end > 0;) {
    const auto begin = static_cast<std::size_t>(best[end].begin);
    const bool unknown = best[end].piece < 0 || (unknown_ && best[end].piece == *unknown_);
    if (unknown && unknown_ && !pieces.empty() && pieces.back().second) {
      pieces.back().first = word.substr(begin, pieces.back().first.size() + (end - begin));
    } else {
      pieces.emplace_back(word.substr(begin, end - begin), unknown);
    }
    end = begin;
  }
  std::reverse(pieces.begin(), pieces.end());  // they were found from the end
  for (const auto& [piece, is_unknown] : pieces) add_piece(piece, is_unknown, ids);
}

void Unigram::add_piece(std::string_view piece, bool unknown, std::vector<std::int32_t>& ids) const {
  // Unknown characters that joined may spell a token after all.
  if (const auto found = ids_.find(piece); found != ids_.end()) {
    ids.push_back(found->second);
    return;
  }
  const auto has_token = [&](char c) { return byte_ids_[static_cast<unsigned char>(c)] >= 0; };
  if (byte_fallback_ && std::all_of(piece.begin(), piece.end(), has_token)) {
    for (const char c : piece) ids.push_back(byte_ids_[static_cast<unsigned char>(c)]);
    return;
  }
  require(!unknown || unknown_.has_value(), "the vocabulary has no token for '{}', and none for unknown characters",
          piece.substr(0, 60));
  ids.push_back(*unknown_);
}

}  // namespace tessera::model::text
