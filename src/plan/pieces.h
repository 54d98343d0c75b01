// Entries as pieces: intervals of consecutive keys under one mask. What validation and set algebra sweep over.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "plan/geometry.h"
#include "tessera/plan.h"

namespace tessera {

/// Keys [begin, end) of a source under one mask. Of a bitmask, pair (row, begin + i) is bit `bit + i` of the row's
/// `words` words from `mask_index` on.
struct Piece {
  std::int64_t begin = 0;
  std::int64_t end = 0;
  std::uint16_t source = 0;
  EntryMask mask = EntryMask::none;
  std::int64_t mask_index = 0;
  std::int64_t words = 0;
  std::int64_t bit = 0;
};

/// Appends the pieces of an entry, ascending: one for tiles and runs, one per stretch of consecutive tokens of a
/// gather.
void append_pieces(const Plan& plan, std::int64_t block, const PlanEntry& entry, std::vector<Piece>& pieces);

/// Replaces bands by what they are in this tile: nothing, every pair (mask none), or a part of the pairs (still a
/// band). Only for blocks in order, where the three are intervals.
void resolve_bands(const Plan& plan, const BlockView& view, std::int64_t tile, std::vector<Piece>& pieces);

/// Writes the bits of one row of a tile over keys [begin, end), which must lie inside the piece.
/// words holds mask_words_of(end - begin) words; unused bits are zero.
void row_bits(const Plan& plan, const BlockView& view, std::int64_t tile, std::int64_t row, const Piece& piece,
              std::int64_t begin, std::int64_t end, std::span<std::uint64_t> words);

/// Pairs of all rows of a tile over keys [begin, end) of the piece.
std::int64_t count_pairs(const Plan& plan, const BlockView& view, std::int64_t tile, const Piece& piece,
                         std::int64_t begin, std::int64_t end);

/// Sets bits [begin, end).
void set_bits(std::span<std::uint64_t> words, std::int64_t begin, std::int64_t end);

}  // namespace tessera
