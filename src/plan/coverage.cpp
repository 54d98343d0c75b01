// How much of a reference plan another plan covers.
#include <algorithm>
#include <bit>
#include <cstddef>

#include "core/error.h"
#include "plan/geometry.h"
#include "plan/row_sweep.h"
#include "tessera/plan.h"

namespace tessera {

namespace {

struct Shared {
  std::int64_t both = 0;
  std::int64_t reference = 0;
};

/// Rows of both plans are the same queries: intervals are compared, pairs only where masks differ.
class TileCoverage {
 public:
  TileCoverage(const Plan& plan, const Plan& reference) : plan_(plan), reference_(reference) {}

  Shared block(std::int64_t in_plan, std::int64_t in_reference) {
    const BlockView view(plan_, in_plan);
    const BlockView reference_view(reference_, in_reference);
    Shared shared;
    for (std::int64_t tile = 0; tile < view.tiles(); ++tile) {
      load_row(plan_, view, tile, 0, pieces_);
      load_row(reference_, reference_view, tile, 0, reference_pieces_);
      sweep_.run(plan_, pieces_, reference_, reference_pieces_,
                 [&](std::int64_t begin, std::int64_t end, const Cover& a, const Cover& b) {
                   if (b.kind == Cover::Kind::nothing) return;
                   const std::int64_t pairs = count(b, reference_view, tile, begin, end);
                   shared.reference += pairs;
                   if (a.kind == Cover::Kind::nothing) return;
                   shared.both += a.kind == Cover::Kind::all   ? pairs
                                  : b.kind == Cover::Kind::all ? count(a, view, tile, begin, end)
                                                               : count_both(a, b, view, tile, begin, end);
                 });
    }
    return shared;
  }

 private:
  /// The pieces of a valid plan are disjoint, so their pairs add up.
  static std::int64_t count(const Cover& cover, const BlockView& view, std::int64_t tile, std::int64_t begin,
                            std::int64_t end) {
    std::int64_t pairs = 0;
    for (const Piece* piece : cover.pieces) pairs += count_pairs(*cover.plan, view, tile, *piece, begin, end);
    return pairs;
  }

  static std::int64_t count_both(const Cover& a, const Cover& b, const BlockView& view, std::int64_t tile,
                                 std::int64_t begin, std::int64_t end) {
    const bool bands = a.kind == Cover::Kind::band && b.kind == Cover::Kind::band;
    if (bands && view.in_order()) {
      return pairs_in_window(intersection_of(a.window, b.window), view.query_position(tile * view.tile_q),
                             view.rows_of(tile), begin, end);
    }
    std::int64_t pairs = 0;
    for (std::int64_t row = 0; row < view.rows_of(tile); ++row) {
      for (std::int64_t from = begin; from < end; from += 64) {
        const std::int64_t to = std::min(from + 64, end);
        std::uint64_t word_a = 0;
        std::uint64_t word_b = 0;
        cover_bits(a, view, tile, row, from, to, {&word_a, 1});
        cover_bits(b, view, tile, row, from, to, {&word_b, 1});
        pairs += std::popcount(word_a & word_b);
      }
    }
    return pairs;
  }

  const Plan& plan_;
  const Plan& reference_;
  RowSweep sweep_;
  std::vector<Piece> pieces_;
  std::vector<Piece> reference_pieces_;
};

/// The keys of single queries as bits in original positions, whatever the plan's tiles and orders.
class QueryKeys {
 public:
  QueryKeys(const Plan& plan, std::int64_t block)
      : plan_(plan),
        view_(plan, block),
        keys_(static_cast<std::size_t>(mask_words_of(view_.keys))),
        part_(keys_.size()) {
    if (view_.query_order.empty()) return;
    place_.assign(static_cast<std::size_t>(plan.problem.q_len_of(view_.sequence)), -1);
    for (std::size_t i = 0; i < view_.query_order.size(); ++i) {
      place_[view_.query_order[i]] = static_cast<std::int32_t>(i);
    }
  }

  std::span<const std::uint64_t> of(std::int64_t query) {
    std::fill(keys_.begin(), keys_.end(), 0);
    const std::int64_t place = place_.empty() ? query : place_[query];
    if (place < 0) return keys_;
    const std::int64_t tile = place / view_.tile_q;
    if (tile != loaded_tile_) load_row(plan_, view_, tile, 0, pieces_);
    loaded_tile_ = tile;
    for (const Piece& piece : pieces_) add(piece, tile, place % view_.tile_q);
    return keys_;
  }

 private:
  void add(const Piece& piece, std::int64_t tile, std::int64_t row) {
    if (view_.key_order.empty() && piece.mask == EntryMask::none) return set_bits(keys_, piece.begin, piece.end);
    const std::int64_t count = piece.end - piece.begin;
    const std::span<std::uint64_t> part(part_.data(), static_cast<std::size_t>(mask_words_of(count)));
    row_bits(plan_, view_, tile, row, piece, piece.begin, piece.end, part);
    for (std::size_t w = 0; w < part.size(); ++w) {
      for (std::uint64_t bits = part[w]; bits != 0; bits &= bits - 1) {
        const std::int64_t place = piece.begin + static_cast<std::int64_t>(w) * 64 + std::countr_zero(bits);
        const std::int64_t key = view_.key_position(place);
        keys_[key / 64] |= std::uint64_t{1} << (key % 64);
      }
    }
  }

  const Plan& plan_;
  BlockView view_;
  std::vector<std::int32_t> place_;  ///< [queries] of each original query, -1 outside the subset; empty: identity
  std::vector<std::uint64_t> keys_;
  std::vector<std::uint64_t> part_;
  std::vector<Piece> pieces_;
  std::int64_t loaded_tile_ = -1;
};

Shared query_coverage(const Plan& plan, std::int64_t in_plan, const Plan& reference, std::int64_t in_reference) {
  QueryKeys keys(plan, in_plan);
  QueryKeys reference_keys(reference, in_reference);
  Shared shared;
  const std::int64_t queries = plan.problem.q_len_of(plan.sequence_of_block(in_plan));
  for (std::int64_t query = 0; query < queries; ++query) {
    const auto a = keys.of(query);
    const auto b = reference_keys.of(query);
    for (std::size_t w = 0; w < b.size(); ++w) {
      shared.both += std::popcount(a[w] & b[w]);
      shared.reference += std::popcount(b[w]);
    }
  }
  return shared;
}

}  // namespace

double coverage(const Plan& plan, const Plan& reference) {
  require(same_problem(plan.problem, reference.problem), "coverage: the plans are about different problems");
  const FinerDivision finer(plan, reference);
  const bool same_rows = plan.tile_q == reference.tile_q && same_orders(plan, reference);
  TileCoverage tiles(plan, reference);
  Shared total;
  for (std::int64_t i = 0; i < finer.blocks(); ++i) {
    const std::int64_t in_plan = finer.block_in(plan, i);
    const std::int64_t in_reference = finer.block_in(reference, i);
    const Shared shared =
        same_rows ? tiles.block(in_plan, in_reference) : query_coverage(plan, in_plan, reference, in_reference);
    total.both += shared.both;
    total.reference += shared.reference;
  }
  return total.reference == 0 ? 1.0 : static_cast<double>(total.both) / static_cast<double>(total.reference);
}

}  // namespace tessera
