#include "view/plan_map.h"

#include <algorithm>
#include <bit>
#include <numeric>

#include "core/error.h"
#include "plan/geometry.h"
#include "plan/pieces.h"

namespace tessera {

PlanMap::PlanMap(std::int64_t queries, std::int64_t keys, std::int64_t most_cells) : queries_(queries), keys_(keys) {
  require(queries > 0 && keys > 0 && most_cells > 0,
          "a plan map of {} x {} positions in {} cells; expected positive sizes", queries, keys, most_cells);
  set_cells(ceil_div(queries, most_cells), ceil_div(keys, most_cells));
}

PlanMap PlanMap::of_call(const Problem& problem, std::int64_t sequence, std::int64_t cell) {
  require(sequence >= 0 && sequence < problem.batch, "sequence {} of a call with {}", sequence, problem.batch);
  require(cell > 0, "a plan map with cells of {} tokens; expected 1 or more", cell);
  PlanMap map;
  map.origin_ = problem.q_offset_of(sequence);
  map.queries_ = problem.q_len_of(sequence);
  map.keys_ = problem.kv_len_of(sequence);
  map.set_cells(cell, cell);
  return map;
}

void PlanMap::set_cells(std::int64_t query_cell, std::int64_t key_cell) {
  query_cell_ = query_cell;
  key_cell_ = key_cell;
  rows_ = ceil_div(queries_, query_cell_);
  columns_ = ceil_div(keys_, key_cell_);
  computed_.assign(static_cast<std::size_t>(rows_ * columns_), 0);
  allowed_.assign(computed_.size(), 0);
}

PlanMap::SourceKind PlanMap::kind_of(const KeySourceInfo& source) {
  if (source.name.starts_with("mean of ") || source.name == "compressed") return SourceKind::pooled;
  return source.name == "tile means" ? SourceKind::corrected : SourceKind::rest;
}

template <class Body>
void PlanMap::for_each_cell(std::int64_t begin, std::int64_t end, std::int64_t cell_size, const Body& body) {
  for (std::int64_t at = begin; at < end;) {
    const std::int64_t cell = at / cell_size;
    const std::int64_t next = std::min(end, (cell + 1) * cell_size);
    body(cell, at, next);
    at = next;
  }
}

void PlanMap::add_allowed(const Plan& plan, std::int64_t sequence) {
  const Problem& problem = plan.problem;
  const Window window = problem.causal ? Window{-1, 0} : Window{};
  const std::int64_t first = problem.q_offset_of(sequence) - origin_;
  for_each_cell(first, first + problem.q_len_of(sequence), query_cell_, [&](auto row, auto top, auto bottom) {
    for_each_cell(0, problem.kv_len_of(sequence), key_cell_, [&](auto column, auto begin, auto end) {
      allowed_[row * columns_ + column] += pairs_in_window(window, origin_ + top, bottom - top, begin, end);
    });
  });
}

void PlanMap::add_tile(const Plan& plan, std::int64_t block, std::int64_t tile) {
  const BlockView view(plan, block);
  const std::int64_t rows = view.rows_of(tile);
  std::vector<Piece> pieces;
  for (const PlanEntry& entry : plan.row(plan.row_begin[block] + tile)) {
    append_pieces(plan, block, entry, pieces);
  }
  std::vector<std::uint64_t> words;
  if (std::any_of(pieces.begin(), pieces.end(), [&](const Piece& piece) {
        return piece.source != 0 && kind_of(plan.sources[piece.source]) == SourceKind::rest;
      })) {
    rest_rows_.resize(static_cast<std::size_t>(rows_), 0);
    for (std::int64_t row = 0; row < rows; ++row)
      ++rest_rows_[static_cast<std::size_t>(row_of(view.query_position(tile * view.tile_q + row)))];
  }
  for (const Piece& piece : pieces) {
    if (piece.source != 0) {
      if (kind_of(plan.sources[piece.source]) != SourceKind::rest) add_derived(plan, view, tile, piece);
      continue;
    }
    if (view.in_order() && piece.mask != EntryMask::bitmask) {
      const Window window = piece.mask == EntryMask::band ? plan.bands[piece.mask_index] : Window{};
      const std::int64_t first = view.query_position(tile * view.tile_q) - origin_;
      for_each_cell(first, first + rows, query_cell_, [&](auto row, auto top, auto bottom) {
        for_each_cell(piece.begin, piece.end, key_cell_, [&](auto column, auto begin, auto end) {
          computed_at(row, column) += pairs_in_window(window, origin_ + top, bottom - top, begin, end);
        });
      });
      continue;
    }
    words.resize(static_cast<std::size_t>(mask_words_of(piece.end - piece.begin)));
    for (std::int64_t row = 0; row < rows; ++row) {
      const std::int64_t map_row = row_of(view.query_position(tile * view.tile_q + row));
      row_bits(plan, view, tile, row, piece, piece.begin, piece.end, words);
      for (std::size_t w = 0; w < words.size(); ++w) {
        for (std::uint64_t rest = words[w]; rest != 0; rest &= rest - 1) {
          const std::int64_t place = piece.begin + static_cast<std::int64_t>(w) * 64 + std::countr_zero(rest);
          ++computed_at(map_row, view.key_position(place) / key_cell_);
        }
      }
    }
  }
}

/// An entry of a pooled source stands for as many keys as there are per entry, in the order of the plan's keys. The
/// compressed tokens of overlapping stretches are taken for the stretch between their beginnings.
void PlanMap::add_derived(const Plan& plan, const BlockView& view, std::int64_t tile, const Piece& piece) {
  const KeySourceInfo& source = plan.sources[piece.source];
  const std::int64_t members = ceil_div(view.keys, std::max<std::int64_t>(source.keys, 1));
  std::vector<std::int64_t>& plane = kind_of(source) == SourceKind::pooled ? pooled_ : corrected_;
  if (plane.empty()) plane.assign(computed_.size(), 0);
  std::vector<std::uint64_t> words(static_cast<std::size_t>(mask_words_of(piece.end - piece.begin)));
  std::vector<std::int64_t> keys_of_column(static_cast<std::size_t>(columns_));
  const std::int64_t rows = view.rows_of(tile);
  for (std::int64_t row = 0; row < rows; ++row) {
    // Without a mask every row sees the same.
    if (row == 0 || piece.mask != EntryMask::none) {
      std::fill(keys_of_column.begin(), keys_of_column.end(), 0);
      row_bits(plan, view, tile, row, piece, piece.begin, piece.end, words);
      for (std::size_t w = 0; w < words.size(); ++w) {
        for (std::uint64_t bits = words[w]; bits != 0; bits &= bits - 1) {
          const std::int64_t entry = piece.begin + static_cast<std::int64_t>(w) * 64 + std::countr_zero(bits);
          for (std::int64_t i = entry * members; i < std::min((entry + 1) * members, view.keys); ++i) {
            ++keys_of_column[static_cast<std::size_t>(view.key_position(i) / key_cell_)];
          }
        }
      }
    }
    const std::int64_t map_row = row_of(view.query_position(tile * view.tile_q + row));
    for (std::int64_t column = 0; column < columns_; ++column) {
      plane[static_cast<std::size_t>(map_row * columns_ + column)] += keys_of_column[static_cast<std::size_t>(column)];
    }
  }
}

std::int64_t PlanMap::pooled(std::int64_t row, std::int64_t column) const {
  const auto cell = static_cast<std::size_t>(row * columns_ + column);
  return pooled_.empty() ? 0 : std::min(pooled_[cell], allowed_[cell] - computed_[cell]);
}

std::int64_t PlanMap::corrected(std::int64_t row, std::int64_t column) const {
  const auto cell = static_cast<std::size_t>(row * columns_ + column);
  const std::int64_t left = allowed_[cell] - computed_[cell] - pooled(row, column);
  if (!corrected_.empty() && corrected_[cell] > 0) return std::min(corrected_[cell], left);
  if (rest_rows_.empty()) return 0;
  const std::int64_t rows = std::min(query_cell_, queries_ - row * query_cell_);
  return left * rest_rows_[static_cast<std::size_t>(row)] / rows;
}

void PlanMap::add(const Plan& plan, std::int64_t sequence, std::int64_t q_head) {
  const Problem& problem = plan.problem;
  require(sequence >= 0 && sequence < problem.batch, "sequence {} of a plan with {}", sequence, problem.batch);
  require(q_head >= 0 && q_head < problem.q_heads, "query head {} of a plan with {}", q_head, problem.q_heads);
  const std::int64_t first = problem.q_offset_of(sequence) - origin_;
  const std::int64_t last = first + problem.q_len_of(sequence);
  const std::int64_t keys = problem.kv_len_of(sequence);
  require(first >= 0 && last <= queries_ && keys <= keys_,
          "a plan of query positions {} to {} and {} keys does not fit a map of {} queries and {} keys", first, last,
          keys, queries_, keys_);
  add_allowed(plan, sequence);
  const std::int64_t block = plan.block_of(sequence, q_head);
  const std::int64_t tiles = plan.row_begin[block + 1] - plan.row_begin[block];
  for (std::int64_t tile = 0; tile < tiles; ++tile) add_tile(plan, block, tile);
}

double PlanMap::share(std::int64_t row, std::int64_t column) const {
  const std::size_t cell = static_cast<std::size_t>(row * columns_ + column);
  if (allowed_[cell] == 0) return -1;
  return static_cast<double>(computed_[cell]) / static_cast<double>(allowed_[cell]);
}

double PlanMap::density() const {
  const std::int64_t allowed = std::accumulate(allowed_.begin(), allowed_.end(), std::int64_t{0});
  const std::int64_t computed = std::accumulate(computed_.begin(), computed_.end(), std::int64_t{0});
  return allowed == 0 ? 0 : static_cast<double>(computed) / static_cast<double>(allowed);
}

}  // namespace tessera
