// Vertical and slash lines: choosing them from line scores, and the plan rows that compute them.
//
// MInference (arXiv 2407.02490), dynamic sparse index building. A vertical line is a key that every query sees; a slash
// line is a distance o that every query p sees at key p - o.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "score/plan_rows.h"

namespace tessera::score {

/// The lines of one head.
struct Lines {
  std::vector<std::int32_t> columns;  ///< keys, ascending
  std::vector<std::int32_t> offsets;  ///< distances, descending
};

/// The best `count` of scores[0, size), of which the first `forced` count as infinite; ties go to the smaller index.
/// Forced entries use up the count, so a count below `forced` keeps the first ones. Ascending. NaN scores are kept on
/// top of everything.
std::vector<std::int32_t> best_lines(std::span<const float> scores, std::int64_t count, std::int64_t forced);

/// Adds the keys of one query tile whose first row has position m0 and whose height is tile_q (64 in the paper):
/// offset o asks for keys [m0 - o, m0 - o + tile_q), shifted to [0, tile_q) where it would begin below 0; offsets of
/// m0 + tile_q and more reach nobody. Runs are merged in descending order of offsets: a run that ends more than tile_q
/// after the current run opens a new one, one that ends later at all extends the current run by a whole tile_q.
/// Columns before the tile that lie in no run are gathered.
/// Differs from the authors' kernel: runs are cut at the last visible key instead of masked there.
void add_vertical_slash(const QueryTiles& tiles, std::int64_t tile, const Lines& lines, PlanRow& row);

}  // namespace tessera::score
