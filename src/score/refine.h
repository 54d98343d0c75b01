// Searches that look at a few representatives of coarse pieces of a sequence and go on inside the best ones.
//
// Candidates in, candidates out, stage by stage: HiP (arXiv 2406.09827) halves the nodes of a tree, InfiniteHiP
// (2502.08910) searches inside chunks of falling size.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

namespace tessera::score {

/// out[i] = score of key keys[i].
using ScoreKeys = std::function<void(std::span<const std::int32_t> keys, float* out)>;

/// Which block of a node stands for it.
enum class Representative : std::uint8_t {
  first,
  centre,
  random  ///< the same for equal seeds and nodes
};

struct TreeSearch {
  std::int64_t keys = 0;   ///< [0, keys) are searched
  std::int64_t block = 2;  ///< keys of a block, the last one may have fewer
  std::int64_t keep = 256;
  Representative representative = Representative::first;
  std::uint64_t seed = 0;
};

/// The blocks that survive, ascending: all of them when there are no more than `keep`, else exactly `keep`. Nodes begin
/// as `keep` equal stretches of blocks. Each round halves every node, scores the halves by the best key of their
/// representative block and keeps the best `keep` halves (ties: the earlier one; NaN first), until nodes are blocks.
std::vector<std::int32_t> search_tree(const TreeSearch& search, const ScoreKeys& score);

/// Candidate chunks [begins[i], min(begins[i] + chunk, end)), ascending and disjoint.
struct Chunks {
  std::int64_t chunk = 0;
  std::int64_t end = 0;
  std::vector<std::int32_t> begins;

  /// [begin, end) cut into chunks.
  static Chunks cut(std::int64_t begin, std::int64_t end, std::int64_t chunk);
  /// Every chunk cut into smaller ones; `smaller` divides chunk.
  Chunks split(std::int64_t smaller) const;
};

/// The best `keep` chunks, ascending; all of them, unscored, when there are no more. A chunk is searched by halving: of
/// each half the key in the middle is scored, the search goes on in the better half (ties: the left one) down to one
/// key, and the chunk scores what was best on the way.
Chunks search_chunks(const Chunks& candidates, std::int64_t keep, const ScoreKeys& score);

}  // namespace tessera::score
