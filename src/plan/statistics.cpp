// What a plan costs: pairs in closed form where the masks allow it, and keys touched as unions over GQA groups.
#include <algorithm>
#include <bit>
#include <cstddef>
#include <string>

#include "core/error.h"
#include "plan/geometry.h"
#include "plan/pieces.h"
#include "tessera/plan.h"

namespace tessera {

namespace {

/// Tokens of a gather inside the windows of consecutive positions: sum over tokens of the rows that see them.
std::int64_t gathered_pairs_in_window(std::span<const std::int32_t> tokens, const Window& window,
                                      std::int64_t first_position, std::int64_t rows) {
  const std::int64_t last_position = first_position + rows - 1;
  std::int64_t pairs = 0;
  for (const std::int64_t key : tokens) {
    // Row p sees key j when j - right <= p <= j + left.
    const std::int64_t first = window.right < 0 ? first_position : std::max(first_position, key - window.right);
    const std::int64_t last = window.left < 0 ? last_position : std::min(last_position, key + window.left);
    pairs += std::max<std::int64_t>(0, last - first + 1);
  }
  return pairs;
}

std::int64_t pairs_of_entry(const Plan& plan, const BlockView& view, std::int64_t tile, std::int64_t rows,
                            const PlanEntry& entry, const Plan::KeyRange& keys) {
  switch (entry.mask) {
    case EntryMask::none:
      return rows * keys.count;
    case EntryMask::bitmask: {
      const std::uint64_t* words = plan.mask_words.data() + entry.mask_index;
      std::int64_t pairs = 0;
      for (std::int64_t w = 0; w < rows * mask_words_of(keys.count); ++w) pairs += std::popcount(words[w]);
      return pairs;
    }
    case EntryMask::band: {
      if (view.in_order()) {
        const Window& window = plan.bands[entry.mask_index];
        const std::int64_t position = view.query_position(tile * plan.tile_q);
        if (entry.kind != EntryKind::gather) {
          return pairs_in_window(window, position, rows, keys.begin, keys.begin + keys.count);
        }
        const std::span<const std::int32_t> tokens(plan.tokens.data() + keys.begin,
                                                   static_cast<std::size_t>(keys.count));
        return gathered_pairs_in_window(tokens, window, position, rows);
      }
      std::vector<Piece> pieces;
      append_pieces(plan, view.block, entry, pieces);
      std::int64_t pairs = 0;
      for (const Piece& piece : pieces) pairs += count_pairs(plan, view, tile, piece, piece.begin, piece.end);
      return pairs;
    }
  }
  return 0;
}

struct BlockCount {
  std::int64_t planned = 0;
  std::int64_t executed = 0;
  std::int64_t empty_rows = 0;
};

BlockCount count_block(const Plan& plan, std::int64_t block) {
  const BlockView view(plan, block);
  BlockCount count;
  for (std::int64_t tile = 0; tile < view.tiles(); ++tile) {
    const std::int64_t rows = view.rows_of(tile);
    const auto entries = plan.row(plan.row_begin[block] + tile);
    if (entries.empty()) ++count.empty_rows;
    for (const PlanEntry& entry : entries) {
      const Plan::KeyRange keys = plan.keys_of(entry, block);
      count.executed += rows * keys.count;
      count.planned += pairs_of_entry(plan, view, tile, rows, entry, keys);
    }
  }
  return count;
}

/// Counts distinct keys of a few rows. Rows that list their keys once, in order, are only summed; others are marked in
/// a bitmap over all sources, whose memory is a bit per key.
class KeyUnion {
 public:
  explicit KeyUnion(const Plan& plan) : plan_(plan) {}

  /// Distinct keys that the given row of all blocks [first_block, first_block + blocks) names.
  std::int64_t count(std::int64_t first_block, std::int64_t blocks, std::int64_t tile) {
    if (blocks == 1) {
      const std::int64_t ordered = count_if_ordered(first_block, tile);
      if (ordered >= 0) return ordered;
    }
    prepare(first_block);
    for (std::int64_t block = first_block; block < first_block + blocks; ++block) {
      const std::int64_t row = plan_.row_begin[block] + tile;
      if (row >= plan_.row_begin[block + 1]) continue;
      for (const PlanEntry& entry : plan_.row(row)) mark(entry, block);
    }
    return collect();
  }

 private:
  /// Sum of counts when entries ascend without overlap, else -1.
  std::int64_t count_if_ordered(std::int64_t block, std::int64_t tile) const {
    std::int64_t keys = 0;
    std::int64_t end = 0;
    std::uint16_t source = 0;
    for (const PlanEntry& entry : plan_.row(plan_.row_begin[block] + tile)) {
      if (plan_.sources[entry.source].repeats_allowed) return -1;
      Plan::KeyRange range = plan_.keys_of(entry, block);
      keys += range.count;
      std::int64_t last = range.begin + range.count;
      if (entry.kind == EntryKind::gather) {
        last = std::int64_t{plan_.tokens[range.begin + range.count - 1]} + 1;
        range.begin = plan_.tokens[range.begin];
      }
      if (entry.source < source || (entry.source == source && range.begin < end)) return -1;
      source = entry.source;
      end = last;
    }
    return keys;
  }

  void prepare(std::int64_t block) {
    source_begin_.assign(1, 0);
    for (std::size_t s = 0; s < plan_.sources.size(); ++s) {
      source_begin_.push_back(source_begin_.back() + plan_.source_keys(static_cast<std::uint16_t>(s), block));
    }
    const auto words = static_cast<std::size_t>(mask_words_of(source_begin_.back()));
    if (bits_.size() < words) bits_.resize(words);
    lowest_ = source_begin_.back();
    highest_ = -1;
  }

  void mark_range(std::int64_t begin, std::int64_t end) {
    set_bits(bits_, begin, end);
    lowest_ = std::min(lowest_, begin);
    highest_ = std::max(highest_, end - 1);
  }

  void mark(const PlanEntry& entry, std::int64_t block) {
    const Plan::KeyRange range = plan_.keys_of(entry, block);
    const std::int64_t base = source_begin_[entry.source];
    const bool mapped = entry.source == 0 && !plan_.key_order.empty() && !plan_.key_order[block].empty();
    if (entry.kind != EntryKind::gather && !mapped) {
      mark_range(base + range.begin, base + range.begin + range.count);
      return;
    }
    for (std::int64_t i = 0; i < range.count; ++i) {
      std::int64_t key = entry.kind == EntryKind::gather ? plan_.tokens[range.begin + i] : range.begin + i;
      if (mapped) key = plan_.key_order[block][key];
      key += base;
      bits_[key / 64] |= std::uint64_t{1} << (key % 64);
      lowest_ = std::min(lowest_, key);
      highest_ = std::max(highest_, key);
    }
  }

  /// Number of marked keys; clears them.
  std::int64_t collect() {
    std::int64_t keys = 0;
    for (std::int64_t w = lowest_ / 64; w <= highest_ / 64 && highest_ >= 0; ++w) {
      keys += std::popcount(bits_[w]);
      bits_[w] = 0;
    }
    return keys;
  }

  const Plan& plan_;
  std::vector<std::uint64_t> bits_;
  std::vector<std::int64_t> source_begin_;  ///< first bit of each source
  std::int64_t lowest_ = 0;
  std::int64_t highest_ = -1;
};

/// Keys touched by all row tiles, per GQA group, summed over key/value heads and sequences.
std::int64_t touched_keys(const Plan& plan) {
  const Problem& problem = plan.problem;
  const std::int64_t blocks_per_group = std::max<std::int64_t>(1, plan.plan_heads / problem.kv_heads);
  const std::int64_t groups = plan.plan_heads / blocks_per_group;
  const std::int64_t sharers = problem.kv_heads / groups * (problem.batch / plan.plan_sequences);
  KeyUnion keys(plan);
  std::int64_t touched = 0;
  for (std::int64_t first = 0; first < plan.plan_sequences * plan.plan_heads; first += blocks_per_group) {
    std::int64_t tiles = 0;
    for (std::int64_t b = first; b < first + blocks_per_group; ++b) {
      tiles = std::max(tiles, plan.row_begin[b + 1] - plan.row_begin[b]);
    }
    for (std::int64_t tile = 0; tile < tiles; ++tile) touched += sharers * keys.count(first, blocks_per_group, tile);
  }
  return touched;
}

double ratio(std::int64_t part, std::int64_t whole) {
  return whole == 0 ? 0 : static_cast<double>(part) / static_cast<double>(whole);
}

}  // namespace

PlanStatistics statistics(const Plan& plan) {
  const Problem& problem = plan.problem;
  const std::int64_t blocks = plan.plan_sequences * plan.plan_heads;
  std::vector<BlockCount> counts;
  counts.reserve(static_cast<std::size_t>(blocks));
  for (std::int64_t b = 0; b < blocks; ++b) counts.push_back(count_block(plan, b));

  PlanStatistics statistics;
  const std::int64_t allowed = problem.allowed_pairs();
  statistics.allowed_pairs = allowed * problem.q_heads;
  for (const BlockCount& count : counts) {
    statistics.planned_pairs += count.planned * sharers_of_block(plan);
    statistics.executed_pairs += count.executed * sharers_of_block(plan);
    statistics.empty_rows += count.empty_rows;
  }
  statistics.density = ratio(statistics.planned_pairs, statistics.allowed_pairs);
  statistics.executed_density = ratio(statistics.executed_pairs, statistics.allowed_pairs);
  const auto dims = static_cast<double>(problem.head_dim + problem.value_dim);
  statistics.flops = 2 * static_cast<double>(statistics.executed_pairs) * dims;
  statistics.kv_bytes = 2 * static_cast<double>(touched_keys(plan)) * dims;
  statistics.entries = static_cast<std::int64_t>(plan.entries.size());
  for (std::int64_t head = 0; head < problem.q_heads; ++head) {
    std::int64_t planned = 0;
    for (std::int64_t s = 0; s < problem.batch; ++s) planned += counts[plan.block_of(s, head)].planned;
    statistics.head_density.push_back(ratio(planned, allowed));
  }
  return statistics;
}

}  // namespace tessera
