#include "score/always_keep.h"

#include <algorithm>

namespace tessera::score {

namespace {

void force(std::vector<std::uint8_t>& forced, std::int64_t first, std::int64_t end) {
  const auto size = static_cast<std::int64_t>(forced.size());
  first = std::clamp<std::int64_t>(first, 0, size);
  end = std::clamp(end, first, size);
  std::fill(forced.begin() + first, forced.begin() + end, std::uint8_t{1});
}

}  // namespace

bool AlwaysKeep::dense(const QueryTiles& tiles, std::int64_t tile) const {
  return tiles.keys < dense_below || tile * tiles.tile_q + tiles.rows(tile) > tiles.queries - last_rows;
}

void AlwaysKeep::force_tiles(const QueryTiles& tiles, std::int64_t tile, std::vector<std::uint8_t>& forced) const {
  forced.assign(static_cast<std::size_t>(tiles.visible_tiles(tile)), 0);
  const std::int64_t height = tiles.tile_k;
  force(forced, 0, (sinks + height - 1) / height);
  if (local > 0) {
    const std::int64_t first = std::max<std::int64_t>(0, tiles.first_position(tile) - local + 1);
    force(forced, first / height, std::max<std::int64_t>(0, tiles.last_position(tile)) / height + 1);
  }
  if (diagonal) {
    const QueryTiles::Range range = tiles.diagonal(tile);
    force(forced, range.first, range.end);
  }
}

void AlwaysKeep::force_keys(const QueryTiles& tiles, std::int64_t tile, std::vector<std::uint8_t>& forced) const {
  forced.assign(static_cast<std::size_t>(tiles.visible_keys(tile)), 0);
  force(forced, 0, sinks);
  const std::int64_t reach = std::max<std::int64_t>(local, diagonal ? 1 : 0);
  if (reach > 0) force(forced, tiles.first_position(tile) - reach + 1, tiles.last_position(tile) + 1);
}

}  // namespace tessera::score
