// A-shape rows: sinks plus a local window, as StreamingLLM (arXiv 2309.17453) prefills, MInference's A-shape heads
// (2407.02490) and the first rows of Tri-shape (SCBench, 2412.10319) see them.
#pragma once

#include <cstdint>

#include "score/plan_rows.h"

namespace tessera::score {

/// Query position p sees key j iff j < n_init or p - j < n_local (itself included), and j <= p where causal; without
/// causality the window reaches as far after the query as before it.
struct AShape {
  std::int64_t n_init = 0;
  std::int64_t n_local = 0;

  /// The window as a band of the plan; an empty window (n_local 0) has none.
  Window band(bool causal) const { return {n_local - 1, causal ? 0 : n_local - 1}; }

  /// Adds the keys of one query tile. Sinks and window partition them, so that nothing counts twice.
  /// band_index: of band(causal) in the plan.
  void add(const QueryTiles& tiles, std::int64_t tile, std::int64_t band_index, PlanRow& row) const;

  /// Adds the keys of a tile whose rows from `dense_from` on see everything (Tri-shape's tail cuts through it).
  void add_with_dense_rows(const QueryTiles& tiles, std::int64_t tile, std::int64_t dense_from, PlanRow& row) const;
};

/// The plan of an A-shape for all heads, in which the last n_last query rows of the call see everything (Tri-shape).
Plan a_shape_plan(const Problem& problem, const AShape& shape, std::int64_t n_last, int threads);

}  // namespace tessera::score
