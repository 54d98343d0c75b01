// Plans from the block formats of other libraries.
#include <algorithm>
#include <cstddef>

#include "core/error.h"
#include "plan/geometry.h"
#include "tessera/plan.h"

namespace tessera {

namespace {

/// One listed key block of a row.
struct Block {
  std::int64_t tile;
  bool full;  ///< the source promises that every pair counts
  friend bool operator<(const Block& a, const Block& b) { return a.tile < b.tile; }
};

/// Writes the row of query tile `query_tile`: blocks in ascending order, neighbours joined, the causal mask where the
/// diagonal passes, nothing where causality leaves nothing.
void add_blocks(PlanBuilder& builder, const Problem& problem, std::int64_t sequence, std::int64_t query_tile,
                std::vector<Block>& blocks) {
  const std::int64_t keys = problem.kv_len_of(sequence);
  const std::int64_t first = problem.q_offset_of(sequence) + query_tile * builder.tile_q();
  const std::int64_t last =
      problem.q_offset_of(sequence) + std::min((query_tile + 1) * builder.tile_q(), problem.q_len_of(sequence)) - 1;
  std::sort(blocks.begin(), blocks.end());
  std::int64_t begin = 0;
  std::int64_t count = 0;
  EntryMask mask = EntryMask::none;
  const auto flush = [&] {
    builder.tiles(begin, count, mask);
    count = 0;
  };
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    const std::int64_t tile = blocks[i].tile;
    require(tile >= 0 && tile < ceil_div(keys, builder.tile_k()), "key block {} is out of range; expected 0 to {}",
            tile, ceil_div(keys, builder.tile_k()) - 1);
    require(i == 0 || tile != blocks[i - 1].tile, "key block {} is listed twice for query block {}", tile, query_tile);
    const std::int64_t last_key = std::min((tile + 1) * builder.tile_k(), keys) - 1;
    EntryMask needed = EntryMask::none;
    if (problem.causal && last_key > first) {
      require(!blocks[i].full, "key block {} is listed as full for query block {} but reaches beyond its causal keys",
              tile, query_tile);
      if (tile * builder.tile_k() > last) continue;  // no query of the tile sees it
      needed = EntryMask::band;
    }
    if (count != 0 && begin + count == tile && mask == needed) {
      ++count;
      continue;
    }
    flush();
    begin = tile;
    count = 1;
    mask = needed;
  }
  flush();
  builder.end_row();
}

/// How a [B or 1, H or 1, rows] tensor of this size is divided.
struct Division {
  std::int64_t sequences = 1;
  std::int64_t heads = 1;
};

Division division_of(const Problem& problem, std::size_t size, std::int64_t rows) {
  const auto entries = static_cast<std::int64_t>(size);
  for (const Division division : {Division{1, 1}, Division{1, problem.q_heads},
                                  Division{problem.batch, problem.q_heads}, Division{problem.batch, 1}}) {
    if (entries == division.sequences * division.heads * rows) return division;
  }
  fail("kv_num_blocks has {} entries; expected [1, 1], [1, {}], [{}, {}] or [{}, 1] x {} query blocks", size,
       problem.q_heads, problem.batch, problem.q_heads, problem.batch, rows);
}

/// A counts + indices pair of a BlockMask.
class BlockLists {
 public:
  BlockLists(std::span<const std::int32_t> counts, std::span<const std::int32_t> indices, std::string_view name)
      : counts_(counts), indices_(indices), columns_(counts.empty() ? 0 : indices.size() / counts.size()), name_(name) {
    require(indices.size() == columns_ * counts.size(), "{}_indices has {} entries, not a multiple of the {} rows",
            name, indices.size(), counts.size());
  }
  void append(std::int64_t row, bool full, std::vector<Block>& blocks) const {
    if (counts_.empty()) return;
    const std::int32_t count = counts_[row];
    require(count >= 0 && static_cast<std::size_t>(count) <= columns_, "{}_num_blocks[{}] is {}; expected 0 to {}",
            name_, row, count, columns_);
    for (const std::int32_t index : indices_.subspan(row * columns_, static_cast<std::size_t>(count))) {
      blocks.push_back({index, full});
    }
  }

 private:
  std::span<const std::int32_t> counts_;
  std::span<const std::int32_t> indices_;
  std::size_t columns_;
  std::string_view name_;
};

}  // namespace

Plan plan_from_block_mask(const Problem& problem, std::int64_t block_q, std::int64_t block_k,
                          std::span<const std::int32_t> kv_num_blocks, std::span<const std::int32_t> kv_indices,
                          std::span<const std::int32_t> full_kv_num_blocks,
                          std::span<const std::int32_t> full_kv_indices) {
  problem.validate();
  require(!problem.variable_length(), "a BlockMask needs a uniform batch; cu_seqlens are given");
  require(block_q >= 1 && block_k >= 1, "block sizes are {} x {}; expected 1 or more", block_q, block_k);
  require(full_kv_num_blocks.empty() || full_kv_num_blocks.size() == kv_num_blocks.size(),
          "full_kv_num_blocks has {} entries; expected {} as kv_num_blocks", full_kv_num_blocks.size(),
          kv_num_blocks.size());
  const std::int64_t rows = ceil_div(problem.q_len, block_q);
  const Division division = division_of(problem, kv_num_blocks.size(), rows);
  const BlockLists partial(kv_num_blocks, kv_indices, "kv");
  const BlockLists full(full_kv_num_blocks, full_kv_indices, "full_kv");
  PlanBuilder builder(problem, block_q, block_k, division.heads, division.sequences);
  std::vector<Block> blocks;
  for (std::int64_t row = 0; row < division.sequences * division.heads * rows; ++row) {
    blocks.clear();
    partial.append(row, false, blocks);
    full.append(row, true, blocks);
    add_blocks(builder, problem, row / (division.heads * rows), row % rows, blocks);
  }
  return std::move(builder).finish();
}

Plan plan_from_bsr(const Problem& problem, std::int64_t block_q, std::int64_t block_k,
                   std::span<const std::int32_t> indptr, std::span<const std::int32_t> indices) {
  problem.validate();
  require(!problem.variable_length(), "a BSR matrix for all sequences needs a uniform batch; cu_seqlens are given");
  require(block_q >= 1 && block_k >= 1, "block sizes are {} x {}; expected 1 or more", block_q, block_k);
  const std::int64_t rows = ceil_div(problem.q_len, block_q);
  require(static_cast<std::int64_t>(indptr.size()) == rows + 1, "indptr has {} entries; expected {} query blocks + 1",
          indptr.size(), rows);
  require(indptr.front() == 0 && std::is_sorted(indptr.begin(), indptr.end()) &&
              static_cast<std::size_t>(indptr.back()) == indices.size(),
          "indptr must ascend from 0 to the {} indices", indices.size());
  PlanBuilder builder(problem, block_q, block_k, 1, 1);
  builder.reserve(indices.size());
  std::vector<Block> blocks;
  for (std::int64_t row = 0; row < rows; ++row) {
    blocks.clear();
    for (std::int32_t i = indptr[row]; i < indptr[row + 1]; ++i) blocks.push_back({indices[i], false});
    add_blocks(builder, problem, 0, row, blocks);
  }
  return std::move(builder).finish();
}

}  // namespace tessera
