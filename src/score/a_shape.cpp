#include "score/a_shape.h"

#include <algorithm>
#include <vector>

namespace tessera::score {

void AShape::add(const QueryTiles& tiles, std::int64_t tile, std::int64_t band_index, PlanRow& row) const {
  const std::int64_t first = tiles.first_position(tile);
  const std::int64_t last = tiles.last_position(tile);
  const std::int64_t visible = tiles.visible_keys(tile);
  const std::int64_t sinks = std::min(n_init, visible);
  row.visible_run(tiles, tile, 0, sinks);
  if (n_local == 0) return;
  const Window window = band(tiles.causal);
  const std::int64_t begin = std::clamp(first - window.left, sinks, visible);
  const std::int64_t end = std::clamp(last + window.right + 1, begin, visible);
  // Without the edges of the window in it, the run needs the causal mask at most.
  if (begin >= last - window.left && end <= first + window.right + 1) {
    row.run(begin, end);
  } else if (begin >= last - window.left && tiles.causal) {
    row.visible_run(tiles, tile, begin, end);
  } else {
    row.run(begin, end, EntryMask::band, band_index);
  }
}

void AShape::add_with_dense_rows(const QueryTiles& tiles, std::int64_t tile, std::int64_t dense_from,
                                 PlanRow& row) const {
  const std::int64_t visible = tiles.visible_keys(tile);
  const std::int64_t sinks = std::min(n_init, visible);
  row.visible_run(tiles, tile, 0, sinks);
  const Window window = band(tiles.causal);
  const std::int64_t words = (visible - sinks + 63) / 64;
  std::vector<std::uint64_t> bits(static_cast<std::size_t>(tiles.rows(tile) * words), 0);
  for (std::int64_t r = 0; r < tiles.rows(tile); ++r) {
    const std::int64_t position = tiles.first_position(tile) + r;
    std::int64_t begin = sinks;
    std::int64_t end = tiles.keys_visible_from(position);
    if (r < dense_from) {
      begin = std::max(begin, position - window.left);
      end = std::min(end, position + window.right + 1);
    }
    for (std::int64_t j = begin; j < end; ++j) {
      bits[r * words + (j - sinks) / 64] |= std::uint64_t{1} << ((j - sinks) % 64);
    }
  }
  row.bits(sinks, visible, bits);
}

Plan a_shape_plan(const Problem& problem, const AShape& shape, std::int64_t n_last, int threads) {
  PlanRows rows(problem, 128, 128, 1, !problem.variable_length());
  const std::int64_t band = rows.add_band(shape.band(problem.causal));
  for (std::int64_t block = 0; block < rows.blocks(); ++block) {
    const QueryTiles tiles = rows.geometry(block);
    const std::int64_t dense_from = tiles.queries - std::min(n_last, tiles.queries);
    parallel_for(tiles.count(), threads, [&](std::int64_t tile, int) {
      PlanRow& row = rows.row(block, tile);
      const std::int64_t cut = dense_from - tile * tiles.tile_q;
      if (cut <= 0) {
        row.everything(tiles, tile);
      } else if (cut < tiles.rows(tile)) {
        shape.add_with_dense_rows(tiles, tile, cut, row);
      } else {
        shape.add(tiles, tile, band, row);
      }
    });
  }
  return std::move(rows).finish(threads);
}

}  // namespace tessera::score
