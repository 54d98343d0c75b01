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

}  // namespace tessera::score
