#include "plan/row_sweep.h"

#include <algorithm>

#include "core/error.h"

namespace tessera {

Window intersection_of(const Window& a, const Window& b) {
  const auto nearer = [](std::int64_t x, std::int64_t y) { return x < 0 ? y : y < 0 ? x : std::min(x, y); };
  return {nearer(a.left, b.left), nearer(a.right, b.right)};
}

Window union_of(const Window& a, const Window& b) {
  const auto farther = [](std::int64_t x, std::int64_t y) { return x < 0 || y < 0 ? -1 : std::max(x, y); };
  return {farther(a.left, b.left), farther(a.right, b.right)};
}

Cover cover_of(const Plan& plan, std::span<const Piece* const> pieces) {
  Cover cover{Cover::Kind::nothing, {}, pieces, &plan};
  bool bands_only = true;
  for (const Piece* piece : pieces) {
    if (piece->mask == EntryMask::none) {
      cover.kind = Cover::Kind::all;
      return cover;
    }
    bands_only = bands_only && piece->mask == EntryMask::band;
    if (!bands_only) continue;
    const Window& window = plan.bands[piece->mask_index];
    cover.window = piece == pieces.front() ? window : union_of(cover.window, window);
  }
  if (!pieces.empty()) cover.kind = bands_only ? Cover::Kind::band : Cover::Kind::bits;
  return cover;
}

void cover_bits(const Cover& cover, const BlockView& view, std::int64_t tile, std::int64_t row, std::int64_t begin,
                std::int64_t end, std::span<std::uint64_t> words) {
  std::fill(words.begin(), words.end(), 0);
  for (std::int64_t at = begin; at < end; at += 64) {
    for (const Piece* piece : cover.pieces) {
      std::uint64_t word = 0;
      row_bits(*cover.plan, view, tile, row, *piece, at, std::min(at + 64, end), {&word, 1});
      words[(at - begin) / 64] |= word;
    }
  }
}

void load_row(const Plan& plan, const BlockView& view, std::int64_t tile, std::uint16_t source,
              std::vector<Piece>& pieces) {
  pieces.clear();
  for (const PlanEntry& entry : plan.row(plan.row_begin[view.block] + tile)) {
    if (entry.source == source) append_pieces(plan, view.block, entry, pieces);
  }
  if (view.in_order()) resolve_bands(plan, view, tile, pieces);
  const auto before = [](const Piece& a, const Piece& b) { return a.begin < b.begin; };
  if (!std::is_sorted(pieces.begin(), pieces.end(), before)) std::sort(pieces.begin(), pieces.end(), before);
}

void RowSweep::find_borders(std::span<const Piece> a, std::span<const Piece> b) {
  borders_.clear();
  for (const auto& pieces : {a, b}) {
    for (const Piece& piece : pieces) {
      borders_.push_back(piece.begin);
      borders_.push_back(piece.end);
    }
  }
  std::sort(borders_.begin(), borders_.end());
  borders_.erase(std::unique(borders_.begin(), borders_.end()), borders_.end());
}

void RowSweep::advance(std::span<const Piece> pieces, std::int64_t begin, std::size_t& next,
                       std::vector<const Piece*>& open) {
  std::erase_if(open, [&](const Piece* piece) { return piece->end <= begin; });
  for (; next < pieces.size() && pieces[next].begin <= begin; ++next) open.push_back(&pieces[next]);
}

bool same_orders(const Plan& a, const Plan& b) {
  const FinerDivision finer(a, b);
  const auto order_of = [](const std::vector<std::vector<std::int32_t>>& orders, std::int64_t block) {
    return orders.empty() ? std::span<const std::int32_t>() : std::span<const std::int32_t>(orders[block]);
  };
  for (std::int64_t i = 0; i < finer.blocks(); ++i) {
    const std::int64_t in_a = finer.block_in(a, i);
    const std::int64_t in_b = finer.block_in(b, i);
    if (!std::ranges::equal(order_of(a.query_order, in_a), order_of(b.query_order, in_b)) ||
        !std::ranges::equal(order_of(a.key_order, in_a), order_of(b.key_order, in_b))) {
      return false;
    }
  }
  return true;
}

void check_compatible(const Plan& a, const Plan& b, std::string_view action) {
  require(same_problem(a.problem, b.problem), "{}: the plans are about different problems", action);
  require(a.tile_q == b.tile_q, "{}: tile_q differs: {} and {}", action, a.tile_q, b.tile_q);
  require(same_orders(a, b), "{}: the plans order queries or keys differently", action);
}

}  // namespace tessera
