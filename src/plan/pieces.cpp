#include "plan/pieces.h"

#include <algorithm>
#include <bit>
#include <cassert>

namespace tessera {

namespace {

/// Positions of the rows of a tile, for blocks with an order.
bool sees(const Plan& plan, const BlockView& view, const Piece& piece, std::int64_t place, std::int64_t key) {
  return window_contains(plan.bands[piece.mask_index], view.query_position(place), view.key_position(key));
}

}  // namespace

void append_pieces(const Plan& plan, std::int64_t block, const PlanEntry& entry, std::vector<Piece>& pieces) {
  const Plan::KeyRange keys = plan.keys_of(entry, block);
  const std::int64_t words = entry.mask == EntryMask::bitmask ? mask_words_of(keys.count) : 0;
  if (entry.kind != EntryKind::gather) {
    pieces.push_back({keys.begin, keys.begin + keys.count, entry.source, entry.mask, entry.mask_index, words, 0});
    return;
  }
  const std::int32_t* tokens = plan.tokens.data() + keys.begin;
  for (std::int64_t i = 0; i < keys.count;) {
    std::int64_t last = i + 1;
    while (last < keys.count && tokens[last] == tokens[last - 1] + 1) ++last;
    const std::int64_t begin = tokens[i];
    pieces.push_back({begin, begin + last - i, entry.source, entry.mask, entry.mask_index, words, i});
    i = last;
  }
}

void resolve_bands(const Plan& plan, const BlockView& view, std::int64_t tile, std::vector<Piece>& pieces) {
  assert(view.in_order());
  const std::int64_t first = view.query_position(tile * view.tile_q);
  const std::int64_t last = first + view.rows_of(tile) - 1;
  std::vector<Piece> resolved;
  resolved.reserve(pieces.size() + 2);
  for (const Piece& piece : pieces) {
    if (piece.mask != EntryMask::band) {
      resolved.push_back(piece);
      continue;
    }
    const Window& window = plan.bands[piece.mask_index];
    // Some row sees [some_begin, some_end), every row sees [every_begin, every_end) (which may be empty).
    const auto clip = [&](std::int64_t key) { return std::clamp(key, piece.begin, piece.end); };
    const std::int64_t some_begin = window.left < 0 ? piece.begin : clip(first - window.left);
    const std::int64_t some_end = window.right < 0 ? piece.end : clip(last + window.right + 1);
    std::int64_t every_begin = window.left < 0 ? piece.begin : clip(last - window.left);
    std::int64_t every_end = window.right < 0 ? piece.end : clip(first + window.right + 1);
    if (every_begin >= every_end) every_begin = every_end = some_end;
    const auto add = [&](std::int64_t begin, std::int64_t end, EntryMask mask) {
      if (begin >= end) return;
      resolved.push_back({begin, end, piece.source, mask, mask == EntryMask::band ? piece.mask_index : 0, 0, 0});
    };
    add(some_begin, every_begin, EntryMask::band);
    add(every_begin, every_end, EntryMask::none);
    add(every_end, some_end, EntryMask::band);
  }
  pieces.swap(resolved);
}

void set_bits(std::span<std::uint64_t> words, std::int64_t begin, std::int64_t end) {
  if (begin >= end) return;
  const std::uint64_t low = ~std::uint64_t{0} << (begin % 64);
  const std::uint64_t high = ~std::uint64_t{0} >> (63 - (end - 1) % 64);
  const std::int64_t first = begin / 64;
  const std::int64_t last = (end - 1) / 64;
  if (first == last) {
    words[first] |= low & high;
    return;
  }
  words[first] |= low;
  for (std::int64_t w = first + 1; w < last; ++w) words[w] = ~std::uint64_t{0};
  words[last] |= high;
}

void row_bits(const Plan& plan, const BlockView& view, std::int64_t tile, std::int64_t row, const Piece& piece,
              std::int64_t begin, std::int64_t end, std::span<std::uint64_t> words) {
  assert(begin >= piece.begin && end <= piece.end);
  const std::int64_t count = end - begin;
  std::fill(words.begin(), words.end(), 0);
  const std::int64_t place = tile * view.tile_q + row;
  switch (piece.mask) {
    case EntryMask::none:
      set_bits(words, 0, count);
      return;
    case EntryMask::band: {
      if (!view.key_order.empty()) {
        for (std::int64_t i = 0; i < count; ++i) {
          if (sees(plan, view, piece, place, begin + i)) words[i / 64] |= std::uint64_t{1} << (i % 64);
        }
        return;
      }
      const Window& window = plan.bands[piece.mask_index];
      const std::int64_t position = view.query_position(place);
      const std::int64_t first = window.left < 0 ? begin : std::clamp(position - window.left, begin, end);
      const std::int64_t last = window.right < 0 ? end : std::clamp(position + window.right + 1, begin, end);
      set_bits(words, first - begin, last - begin);
      return;
    }
    case EntryMask::bitmask: {
      const std::uint64_t* from = plan.mask_words.data() + piece.mask_index + row * piece.words;
      const std::int64_t bit = piece.bit + begin - piece.begin;
      for (std::int64_t i = 0; i < count; i += 64) {
        const std::int64_t word = (bit + i) / 64;
        const std::int64_t shift = (bit + i) % 64;
        std::uint64_t value = from[word] >> shift;
        if (shift != 0 && word + 1 < piece.words) value |= from[word + 1] << (64 - shift);
        words[i / 64] = value;
      }
      if (count % 64 != 0) words[count / 64] &= (std::uint64_t{1} << (count % 64)) - 1;
      return;
    }
  }
}

std::int64_t count_pairs(const Plan& plan, const BlockView& view, std::int64_t tile, const Piece& piece,
                         std::int64_t begin, std::int64_t end) {
  const std::int64_t rows = view.rows_of(tile);
  if (piece.mask == EntryMask::none) return rows * (end - begin);
  if (piece.mask == EntryMask::band && view.in_order()) {
    return pairs_in_window(plan.bands[piece.mask_index], view.query_position(tile * view.tile_q), rows, begin, end);
  }
  std::vector<std::uint64_t> words(mask_words_of(end - begin));
  std::int64_t pairs = 0;
  for (std::int64_t row = 0; row < rows; ++row) {
    row_bits(plan, view, tile, row, piece, begin, end, words);
    for (const std::uint64_t word : words) pairs += std::popcount(word);
  }
  return pairs;
}

}  // namespace tessera
