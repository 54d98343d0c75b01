// The plan: for each (sequence, plan head, query tile), which keys to compute and how. A plain value, no kernel needed.
#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "tessera/core.h"

namespace tessera {

/// How an entry names its keys.
enum class EntryKind : std::uint8_t {
  tile,   ///< `begin` = first key tile, `count` = consecutive tiles of Plan::tile_k keys (the last may be ragged)
  run,    ///< `begin` = first key, `count` = keys, any start
  gather  ///< `begin` = offset into Plan::tokens, `count` = keys; several entries may share one list
};

/// Which pairs inside the entry count.
enum class EntryMask : std::uint8_t {
  none,    ///< every pair
  band,    ///< the window Plan::bands[mask_index], judged in original positions; band 0 is always causal {-1, 0}
  bitmask  ///< bit (row, key): word Plan::mask_words[mask_index + row * words(count) + key / 64], bit key % 64
};

/// One piece of a plan row: 24 bytes.
struct PlanEntry {
  std::int64_t begin = 0;
  std::int32_t count = 0;
  EntryKind kind = EntryKind::run;
  EntryMask mask = EntryMask::none;
  std::uint16_t source = 0;     ///< index into Plan::sources
  std::int64_t mask_index = 0;  ///< see EntryMask
  friend bool operator==(const PlanEntry&, const PlanEntry&) = default;
};

/// Keys an entry may name. Source 0 is the raw K/V of the call; derived sources (pooled, landmark, sampled, ...) are
/// handed to the kernel beside it and carry one log-weight per key.
struct KeySourceInfo {
  std::string name = "raw";
  std::int64_t keys = 0;         ///< keys per sequence; 0 for source 0: the sequence's own kv_len
  bool repeats_allowed = false;  ///< sampled sources may name a key twice
  friend bool operator==(const KeySourceInfo&, const KeySourceInfo&) = default;
};

/// Numbers about a plan. Density is judged against the pairs the hard mask of the problem allows.
struct PlanStatistics {
  std::int64_t allowed_pairs = 0;   ///< per all query heads
  std::int64_t planned_pairs = 0;   ///< pairs that survive the masks, per all query heads
  std::int64_t executed_pairs = 0;  ///< area of the entries before masks: what the time follows
  double density = 0;               ///< planned / allowed
  double executed_density = 0;      ///< executed / allowed
  double flops = 0;                 ///< 2 * executed * (head_dim + value_dim)
  double kv_bytes = 0;              ///< keys and values touched, union over each GQA group, 2-byte elements
  std::int64_t entries = 0;
  std::int64_t empty_rows = 0;       ///< query tiles without any key
  std::vector<double> head_density;  ///< per query head
};

/// A sparse attention plan.
///
/// Rows are CSR over (plan sequence, plan head, query tile), in that order. plan_sequences is 1 (all sequences share
/// the rows; they must have equal lengths) or the batch. plan_heads is 1 (shared by all query heads), kv_heads (one
/// per GQA group) or q_heads. A row covers query positions [tile * tile_q, ...) of the (permuted or chosen) queries.
struct Plan {
  Problem problem;
  std::int64_t tile_q = 128;
  std::int64_t tile_k = 128;
  std::int64_t plan_sequences = 1;
  std::int64_t plan_heads = 1;

  std::vector<std::int64_t> row_begin;    ///< [plan_sequences * plan_heads + 1]: first row of each (sequence, head)
  std::vector<std::int64_t> entry_begin;  ///< [rows + 1]: CSR offsets into `entries`
  std::vector<PlanEntry> entries;
  std::vector<std::int32_t> tokens;       ///< pool of gather lists
  std::vector<std::uint64_t> mask_words;  ///< pool of bitmasks
  std::vector<Window> bands = {{-1, 0}};
  std::vector<KeySourceInfo> sources = {{}};

  /// Optional order of queries and keys, per (plan sequence, plan head). query_order[i] = original query index at
  /// place i; fewer entries than q_len make a query subset (other rows get output 0, LSE -inf). key_order is a full
  /// permutation of source 0. Empty vectors mean identity. Masks by position use the original indices.
  std::vector<std::vector<std::int32_t>> query_order;
  std::vector<std::vector<std::int32_t>> key_order;

  std::int64_t rows() const { return static_cast<std::int64_t>(entry_begin.empty() ? 0 : entry_begin.size() - 1); }
  /// Index of (sequence, query head) among the plan's (plan sequence, plan head) pairs.
  std::int64_t block_of(std::int64_t sequence, std::int64_t q_head) const {
    return (plan_sequences == 1 ? 0 : sequence) * plan_heads + q_head * plan_heads / problem.q_heads;
  }
  /// Queries covered by that block: q_len of the sequence, or the size of its query subset.
  std::int64_t queries_of(std::int64_t block) const;
  /// Sequence that stands for this block (the first one it covers).
  std::int64_t sequence_of_block(std::int64_t block) const { return block / plan_heads; }
  std::span<const PlanEntry> row(std::int64_t r) const {
    return {entries.data() + entry_begin[r], entries.data() + entry_begin[r + 1]};
  }
  /// Keys of a source as seen by a block.
  std::int64_t source_keys(std::uint16_t source, std::int64_t block) const;
  /// First key and number of keys an entry covers; for gather entries `begin` is the offset into `tokens`.
  struct KeyRange {
    std::int64_t begin;
    std::int64_t count;
  };
  KeyRange keys_of(const PlanEntry& entry, std::int64_t block) const;

  /// Heap bytes held by the plan.
  std::size_t memory_bytes() const;
  friend bool operator==(const Plan&, const Plan&);
};

/// Writes plan rows in CSR order: begin with block 0, tile 0; entries of the row; end_row(); next query tile.
///
/// Entries of a row may come in any order. Entries without keys (count 0) are dropped.
class PlanBuilder {
 public:
  /// plan_heads must be 1, kv_heads or q_heads of the problem; plan_sequences 1 or its batch (its batch when the
  /// lengths vary).
  PlanBuilder(const Problem& problem, std::int64_t tile_q, std::int64_t tile_k, std::int64_t plan_heads,
              std::int64_t plan_sequences);
  /// Builder of one block of such a plan: a part for concatenate_blocks(), for building blocks in parallel.
  static PlanBuilder for_block(const Problem& problem, std::int64_t tile_q, std::int64_t tile_k,
                               std::int64_t plan_heads, std::int64_t plan_sequences, std::int64_t block);

  std::int64_t tile_q() const { return plan_.tile_q; }
  std::int64_t tile_k() const { return plan_.tile_k; }
  /// (plan sequence, plan head) pairs of the whole plan.
  std::int64_t blocks() const { return plan_.plan_sequences * plan_.plan_heads; }
  /// Query tiles of one block; with a query subset, those of the subset.
  std::int64_t query_tiles(std::int64_t block) const;

  /// Makes room: entries, gather tokens and mask words still to come.
  void reserve(std::size_t entries, std::size_t tokens = 0, std::size_t mask_words = 0);

  std::uint16_t add_source(KeySourceInfo source);
  std::int64_t add_band(Window band);  ///< index for EntryMask::band; equal bands share one index
  void set_query_order(std::int64_t block, std::vector<std::int32_t> order);
  void set_key_order(std::int64_t block, std::vector<std::int32_t> order);

  void tiles(std::int64_t first_tile, std::int64_t count, EntryMask mask = EntryMask::none, std::int64_t mask_index = 0,
             std::uint16_t source = 0) {
    append(EntryKind::tile, first_tile, count, mask, mask_index, source);
  }
  void run(std::int64_t first_key, std::int64_t count, EntryMask mask = EntryMask::none, std::int64_t mask_index = 0,
           std::uint16_t source = 0) {
    append(EntryKind::run, first_key, count, mask, mask_index, source);
  }
  /// Adds a list of keys (ascending) to the pool; gather() can then use it, or a part of it, in many rows.
  std::int64_t add_tokens(std::span<const std::int32_t> tokens) {
    const auto begin = static_cast<std::int64_t>(plan_.tokens.size());
    plan_.tokens.insert(plan_.tokens.end(), tokens.begin(), tokens.end());
    return begin;
  }
  void gather(std::int64_t tokens_begin, std::int64_t count, EntryMask mask = EntryMask::none,
              std::int64_t mask_index = 0, std::uint16_t source = 0) {
    append(EntryKind::gather, tokens_begin, count, mask, mask_index, source);
  }
  /// Adds words of a bitmask to the pool and returns its mask_index.
  std::int64_t add_mask(std::span<const std::uint64_t> words) {
    const auto begin = static_cast<std::int64_t>(plan_.mask_words.size());
    plan_.mask_words.insert(plan_.mask_words.end(), words.begin(), words.end());
    return begin;
  }
  void end_row() { plan_.entry_begin.push_back(static_cast<std::int64_t>(plan_.entries.size())); }

  /// The finished plan (or part). Throws Error unless every row of every block was ended.
  Plan finish() &&;

 private:
  void append(EntryKind kind, std::int64_t begin, std::int64_t count, EntryMask mask, std::int64_t mask_index,
              std::uint16_t source) {
    if (count == 0) return;
    plan_.entries.push_back({begin, static_cast<std::int32_t>(count), kind, mask, source, mask_index});
  }

  Plan plan_;
  std::int64_t first_block_ = 0;  ///< a part holds one block, a plan all of them
  std::int64_t part_blocks_ = 0;
};

/// Joins parts that hold one block each, in order of (plan sequence, plan head): the way to build in parallel. Parts
/// come from PlanBuilder::for_block; in uniform batches also from a builder with one head and one sequence.
Plan concatenate_blocks(const Problem& problem, std::int64_t plan_heads, std::int64_t plan_sequences,
                        std::span<const Plan> parts);

/// Every pair the problem allows: one run per query tile. The definition of dense attention.
Plan dense_plan(const Problem& problem, std::int64_t tile_q = 128, std::int64_t tile_k = 128);

/// Throws Error naming the first fault: malformed CSR or permutation, an index out of range, gather tokens that do not
/// ascend (sources that allow repeats may repeat a token), a pair covered twice, a pair after the query's position when
/// the problem is causal, bits of a bitmask beyond the entry's keys. Entries of a row may come in any order, and may
/// share keys where their masks are disjoint. Linear in the entries where they ascend.
void validate(const Plan& plan);

/// Set algebra on the allowed pairs. Operands need the same problem, tile_q, query order and key order (Error
/// otherwise) and only source 0 for complement and intersect; heads and sequences are broadcast to the finer operand.
Plan unite(const Plan& a, const Plan& b);
Plan intersect(const Plan& a, const Plan& b);
/// The pairs that the hard mask of the problem allows and the plan leaves out. With a query subset: those of its
/// queries.
Plan complement(const Plan& plan);

/// Key tile -> query tiles, CSR per block. What key-major kernels and backward passes walk.
struct PlanTranspose {
  std::int64_t tile_k = 0;
  std::vector<std::int64_t> key_tile_begin;  ///< [blocks + 1]: first key tile of each block in `offsets`
  std::vector<std::int64_t> offsets;         ///< [key tiles + 1] into `rows`
  std::vector<std::int32_t> rows;            ///< query tiles (local to the block), ascending
};
PlanTranspose transpose(const Plan& plan);

PlanStatistics statistics(const Plan& plan);
/// Statistics as a few lines of text for people.
std::string explain(const Plan& plan);
/// Share of the pairs of `reference` over the raw keys that `plan` covers too (1 when the reference is empty). Tile
/// sizes and orders may differ; where they do, the work is queries x (entries + keys / 64), the memory still a bit per
/// key.
double coverage(const Plan& plan, const Plan& reference);

/// Which pairs of source 0 are computed, as bytes [batch, q_heads, q_len, kv_len] (in variable-length
/// batches with batch 1 and all tokens). Refused (Error)
/// above 2^31 elements. For tests and pictures only.
std::vector<std::uint8_t> dense_mask(const Plan& plan);
/// Plan with bitmask entries that computes exactly the pairs of such a mask (true = keep).
Plan plan_from_mask(const Problem& problem, std::span<const std::uint8_t> mask, std::int64_t tile_q,
                    std::int64_t tile_k);

/// BlockMask of FlexAttention: kv_num_blocks [B,H,rows], kv_indices [B,H,rows,columns] and the full_ pair (may be
/// empty).
Plan plan_from_block_mask(const Problem& problem, std::int64_t block_q, std::int64_t block_k,
                          std::span<const std::int32_t> kv_num_blocks, std::span<const std::int32_t> kv_indices,
                          std::span<const std::int32_t> full_kv_num_blocks,
                          std::span<const std::int32_t> full_kv_indices);
/// Block-sparse rows: indptr [rows + 1], indices of key tiles; shared by all heads and sequences.
Plan plan_from_bsr(const Problem& problem, std::int64_t block_q, std::int64_t block_k,
                   std::span<const std::int32_t> indptr, std::span<const std::int32_t> indices);

void save(const Plan& plan, const std::filesystem::path& path);
/// Throws Error for anything but a valid plan file; the result has passed validate().
Plan load_plan(const std::filesystem::path& path);

}  // namespace tessera
