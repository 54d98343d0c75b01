// A plan as a picture: the computed share of the pairs, pooled onto a grid of cells.
#pragma once

#include <cstdint>
#include <vector>

#include "plan/geometry.h"
#include "plan/pieces.h"
#include "tessera/plan.h"

namespace tessera {

/// What one head computes, over query positions (rows) and key positions (columns). Plans of several calls, such as
/// the chunks of a prefill, add up to one map. Memory is proportional to the cells.
class PlanMap {
 public:
  /// A map of positions [0, queries) x [0, keys) with at most `most_cells` cells a side. Throws Error unless all are
  /// positive.
  PlanMap(std::int64_t queries, std::int64_t keys, std::int64_t most_cells = 256);
  /// A map of one sequence of a call whose cells are `cell` tokens a side. Its rows are the queries of the call, not
  /// positions. Throws Error unless the sequence exists and `cell` is positive.
  static PlanMap of_call(const Problem& problem, std::int64_t sequence, std::int64_t cell);

  /// Counts the pairs that the plan computes for a head of a sequence, at their original positions, and those that it
  /// approximates by entries of derived sources. Throws Error when the sequence or the head does not exist or a
  /// position lies outside the map.
  void add(const Plan& plan, std::int64_t sequence, std::int64_t q_head);

  std::int64_t rows() const { return rows_; }
  std::int64_t columns() const { return columns_; }
  std::int64_t allowed(std::int64_t row, std::int64_t column) const { return allowed_[row * columns_ + column]; }
  std::int64_t computed(std::int64_t row, std::int64_t column) const { return computed_[row * columns_ + column]; }
  /// Pairs for which an entry pooled from several keys stands: sources "mean of ..." and "compressed".
  std::int64_t pooled(std::int64_t row, std::int64_t column) const;
  /// Pairs that are made up for in another way: by sampled or held keys, which stand for all that their rows leave out,
  /// or by an expansion around the mean of a tile.
  std::int64_t corrected(std::int64_t row, std::int64_t column) const;
  /// Computed pairs of a cell over the pairs that the hard mask allows there; -1 where it allows none.
  double share(std::int64_t row, std::int64_t column) const;
  /// Computed over allowed pairs, all cells together.
  double density() const;

 private:
  /// Calls body(cell, begin, end) for the parts of [begin, end) in each cell.
  template <class Body>
  static void for_each_cell(std::int64_t begin, std::int64_t end, std::int64_t cell_size, const Body& body);
  /// What the entries of a derived source stand for.
  enum class SourceKind : std::uint8_t { pooled, corrected, rest };

  PlanMap() = default;
  static SourceKind kind_of(const KeySourceInfo& source);
  std::int64_t row_of(std::int64_t position) const { return (position - origin_) / query_cell_; }
  void set_cells(std::int64_t query_cell, std::int64_t key_cell);
  std::int64_t& computed_at(std::int64_t row, std::int64_t column) { return computed_[row * columns_ + column]; }
  void add_allowed(const Plan& plan, std::int64_t sequence);
  void add_tile(const Plan& plan, std::int64_t block, std::int64_t tile);
  void add_derived(const Plan& plan, const BlockView& view, std::int64_t tile, const Piece& piece);

  std::int64_t origin_ = 0;  ///< position of row 0
  std::int64_t queries_ = 0;
  std::int64_t keys_ = 0;
  std::int64_t query_cell_ = 1;  ///< positions per cell
  std::int64_t key_cell_ = 1;
  std::int64_t rows_ = 0;
  std::int64_t columns_ = 0;
  std::vector<std::int64_t> computed_;  ///< [rows, columns] pairs
  std::vector<std::int64_t> allowed_;
  std::vector<std::int64_t> pooled_;  ///< empty until a source needs them
  std::vector<std::int64_t> corrected_;
  std::vector<std::int64_t> rest_rows_;  ///< [rows] queries with an entry that stands for all that they leave out
};

}  // namespace tessera
