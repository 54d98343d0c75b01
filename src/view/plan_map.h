// A plan as a picture: the computed share of the pairs, pooled onto a grid of cells.
#pragma once

#include <cstdint>
#include <vector>

#include "tessera/plan.h"

namespace tessera {

/// What one head computes, over query positions (rows) and key positions (columns). Plans of several calls, such as
/// the chunks of a prefill, add up to one map. Memory is proportional to the cells.
class PlanMap {
 public:
  /// A map of positions [0, queries) x [0, keys) with at most `most_cells` cells a side. Throws Error unless all are
  /// positive.
  PlanMap(std::int64_t queries, std::int64_t keys, std::int64_t most_cells = 256);

  /// Counts the pairs of source 0 that the plan computes for a head of a sequence, at their original positions. Throws
  /// Error when the sequence or the head does not exist or a position lies outside the map.
  void add(const Plan& plan, std::int64_t sequence, std::int64_t q_head);

  std::int64_t rows() const { return rows_; }
  std::int64_t columns() const { return columns_; }
  /// Computed pairs of a cell over the pairs that the hard mask allows there; -1 where it allows none.
  double share(std::int64_t row, std::int64_t column) const;
  /// Computed over allowed pairs, all cells together.
  double density() const;

 private:
  /// Calls body(cell, begin, end) for the parts of [begin, end) in each cell.
  template <class Body>
  static void for_each_cell(std::int64_t begin, std::int64_t end, std::int64_t cell_size, const Body& body);
  std::int64_t& computed_at(std::int64_t row, std::int64_t column) { return computed_[row * columns_ + column]; }
  void add_allowed(const Plan& plan, std::int64_t sequence);
  void add_tile(const Plan& plan, std::int64_t block, std::int64_t tile);

  std::int64_t queries_;
  std::int64_t keys_;
  std::int64_t query_cell_;  ///< positions per cell
  std::int64_t key_cell_;
  std::int64_t rows_;
  std::int64_t columns_;
  std::vector<std::int64_t> computed_;  ///< [rows, columns] pairs
  std::vector<std::int64_t> allowed_;
};

}  // namespace tessera
