#include "score/refine.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>

#include "score/order_key.h"
#include "score/top_k.h"

namespace tessera::score {

namespace {

/// Blocks [begin, begin + size).
struct Node {
  std::int32_t begin = 0;
  std::int32_t size = 0;
  float score = 0;
  bool scored = false;
};

/// splitmix64.
std::uint64_t mixed(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15U;
  x = (x ^ (x >> 30U)) * 0xbf58476d1ce4e5b9U;
  x = (x ^ (x >> 27U)) * 0x94d049bb133111ebU;
  return x ^ (x >> 31U);
}

std::int32_t representative_of(const TreeSearch& search, const Node& node) {
  if (search.representative == Representative::first) return node.begin;
  if (search.representative == Representative::centre) return node.begin + node.size / 2;
  const std::uint64_t place = (static_cast<std::uint64_t>(node.begin) << 32U) + static_cast<std::uint64_t>(node.size);
  return node.begin +
         static_cast<std::int32_t>(mixed(search.seed ^ mixed(place)) % static_cast<std::uint64_t>(node.size));
}

/// The larger one; NaN if either is.
float larger(float a, float b) {
  return std::isnan(a) || a > b ? a : b;
}

bool better(float a, float b) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && !std::isnan(b);
  return a > b;
}

/// Scores the nodes that have no score yet.
void score_nodes(const TreeSearch& search, std::vector<Node>& nodes, std::vector<std::int32_t>& keys,
                 std::vector<float>& scores, const ScoreKeys& score) {
  keys.clear();
  for (const Node& node : nodes) {
    if (node.scored) continue;
    const std::int64_t first = representative_of(search, node) * search.block;
    for (std::int64_t j = first; j < std::min(first + search.block, search.keys); ++j) {
      keys.push_back(static_cast<std::int32_t>(j));
    }
  }
  scores.resize(keys.size());
  score(keys, scores.data());
  std::size_t next = 0;
  for (Node& node : nodes) {
    if (node.scored) continue;
    const std::int64_t first = representative_of(search, node) * search.block;
    const std::int64_t count = std::min(search.block, search.keys - first);
    node.score = scores[next];
    for (std::int64_t i = 1; i < count; ++i)
      node.score = larger(scores[next + static_cast<std::size_t>(i)], node.score);
    node.scored = true;
    next += static_cast<std::size_t>(count);
  }
}

/// Keeps the `keep` best nodes in their order.
void keep_best(std::vector<Node>& nodes, std::size_t keep, std::vector<std::uint64_t>& ranks) {
  if (nodes.size() <= keep) return;
  ranks.clear();
  for (const Node& node : nodes) ranks.push_back(order_key(node.score, node.begin));
  const auto worst = ranks.begin() + static_cast<std::ptrdiff_t>(keep) - 1;
  std::nth_element(ranks.begin(), worst, ranks.end());
  std::erase_if(nodes, [last = *worst](const Node& node) { return order_key(node.score, node.begin) > last; });
}

}  // namespace

std::vector<std::int32_t> search_tree(const TreeSearch& search, const ScoreKeys& score) {
  const std::int64_t blocks = (search.keys + search.block - 1) / search.block;
  std::vector<std::int32_t> kept;
  if (blocks <= search.keep) {
    kept.resize(static_cast<std::size_t>(blocks));
    std::iota(kept.begin(), kept.end(), 0);
    return kept;
  }
  std::vector<Node> nodes(static_cast<std::size_t>(search.keep));
  for (std::int64_t e = 0; e < search.keep; ++e) {
    nodes[e].begin = static_cast<std::int32_t>(blocks * e / search.keep);
    nodes[e].size = static_cast<std::int32_t>(blocks * (e + 1) / search.keep) - nodes[e].begin;
  }
  std::vector<Node> halves;
  std::vector<std::int32_t> keys;
  std::vector<float> scores;
  std::vector<std::uint64_t> ranks;
  // The nominal size is blocks / keep, halved every round.
  for (std::int64_t parts = search.keep; parts < blocks; parts *= 2) {
    halves.clear();
    for (const Node& node : nodes) {
      const std::int32_t left = node.size / 2;
      Node first{node.begin, left, node.score, false};
      Node second{node.begin + left, node.size - left, node.score, false};
      // A half whose representative is that of the whole has its score.
      first.scored = node.scored && left > 0 && representative_of(search, first) == representative_of(search, node);
      second.scored = node.scored && representative_of(search, second) == representative_of(search, node);
      if (left > 0) halves.push_back(first);
      halves.push_back(second);
    }
    score_nodes(search, halves, keys, scores, score);
    keep_best(halves, static_cast<std::size_t>(search.keep), ranks);
    nodes.swap(halves);
  }
  for (const Node& node : nodes) kept.push_back(node.begin);
  return kept;
}

Chunks Chunks::cut(std::int64_t begin, std::int64_t end, std::int64_t chunk) {
  Chunks chunks{chunk, std::max(begin, end), {}};
  for (std::int64_t j = begin; j < end; j += chunk) chunks.begins.push_back(static_cast<std::int32_t>(j));
  return chunks;
}

Chunks Chunks::split(std::int64_t smaller) const {
  Chunks parts{smaller, end, {}};
  for (const std::int32_t begin : begins) {
    for (std::int64_t j = begin; j < std::min(begin + chunk, end); j += smaller) {
      parts.begins.push_back(static_cast<std::int32_t>(j));
    }
  }
  return parts;
}

namespace {

/// Where the search inside a chunk stands: [left, right), and the scores that are known from the way here. Keys are met
/// again only where halves have one key: the middle of an interval stood for it one level above, its first key may have
/// been a middle before.
struct Interval {
  std::int32_t left = 0;
  std::int32_t right = 0;
  float of_first = 0;
  float of_middle = 0;
  bool first_known = false;
  bool middle_known = false;

  std::int32_t middle() const { return left + (right - left) / 2; }
  std::int32_t left_key() const { return left + (middle() - left) / 2; }
  std::int32_t right_key() const { return middle() + (right - middle()) / 2; }
  /// Of an interval of at least two keys.
  bool left_known() const { return first_known && middle() - left == 1; }
  bool right_known() const { return middle_known && right - middle() == 1; }

  void descend(bool to_right, float of_left, float of_right) {
    if (to_right) {
      left = middle();
      of_first = of_middle;
      first_known = middle_known;
    } else {
      right = middle();
    }
    of_middle = to_right ? of_right : of_left;
    middle_known = true;
  }
};

}  // namespace

Chunks search_chunks(const Chunks& candidates, std::int64_t keep, const ScoreKeys& score) {
  const std::size_t count = candidates.begins.size();
  if (static_cast<std::int64_t>(count) <= keep) return candidates;
  std::vector<Interval> intervals(count);
  std::vector<float> best(count, -std::numeric_limits<float>::infinity());
  std::vector<std::int32_t> keys;
  std::vector<float> scores;
  std::vector<std::int32_t> searched;
  keys.reserve(2 * count);
  searched.reserve(count);
  const auto score_listed = [&] {
    scores.resize(keys.size());
    if (!keys.empty()) score(keys, scores.data());
  };
  std::vector<std::int32_t> single;  // a chunk of one key is that key
  for (std::size_t i = 0; i < count; ++i) {
    const std::int64_t begin = candidates.begins[i];
    intervals[i].left = candidates.begins[i];
    intervals[i].right = static_cast<std::int32_t>(std::min(begin + candidates.chunk, candidates.end));
    const bool one = intervals[i].right - intervals[i].left == 1;
    (one ? single : searched).push_back(static_cast<std::int32_t>(i));
    if (one) keys.push_back(candidates.begins[i]);
  }
  score_listed();
  for (std::size_t i = 0; i < single.size(); ++i) best[single[i]] = scores[i];
  while (!searched.empty()) {
    keys.clear();
    for (const std::int32_t i : searched) {
      const Interval& own = intervals[i];
      if (!own.left_known()) keys.push_back(own.left_key());
      if (!own.right_known()) keys.push_back(own.right_key());
    }
    score_listed();
    const float* next = scores.data();
    for (const std::int32_t i : searched) {
      Interval& own = intervals[i];
      const float of_left = own.left_known() ? own.of_first : *next++;
      const float of_right = own.right_known() ? own.of_middle : *next++;
      best[i] = larger(of_left, larger(of_right, best[i]));
      own.descend(better(of_right, of_left), of_left, of_right);
    }
    std::erase_if(searched, [&](std::int32_t i) { return intervals[i].right - intervals[i].left <= 1; });
  }
  Chunks chosen{candidates.chunk, candidates.end, {}};
  for (const std::int32_t i : top_k(best, keep))
    chosen.begins.push_back(candidates.begins[static_cast<std::size_t>(i)]);
  return chosen;
}

}  // namespace tessera::score
