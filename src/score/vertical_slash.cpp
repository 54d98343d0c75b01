#include "score/vertical_slash.h"

#include <algorithm>
#include <limits>

#include "score/top_k.h"

namespace tessera::score {

std::vector<std::int32_t> best_lines(std::span<const float> scores, std::int64_t count, std::int64_t forced) {
  std::vector<float> raised(scores.begin(), scores.end());
  const std::int64_t infinite = std::min(forced, static_cast<std::int64_t>(raised.size()));
  std::fill_n(raised.begin(), infinite, std::numeric_limits<float>::infinity());
  return top_k(raised, count, {}, ForcedCount::outside);  // NaN scores come on top
}

void add_vertical_slash(const QueryTiles& tiles, std::int64_t tile, const Lines& lines, PlanRow& row) {
  const std::int64_t m0 = tiles.first_position(tile);
  const std::int64_t height = tiles.tile_q;
  const std::int64_t visible = tiles.visible_keys(tile);
  if (visible == 0) return;

  auto column = lines.columns.begin();
  std::vector<std::int32_t> gathered;
  const auto close_run = [&](std::int64_t first, std::int64_t end) {
    // Columns before the tile that lie before this run (and after the previous one).
    for (; column != lines.columns.end() && *column < std::min(first, m0); ++column) gathered.push_back(*column);
    while (column != lines.columns.end() && *column < end) ++column;
    row.visible_run(tiles, tile, std::min(first, visible), end);
  };

  bool open = false;
  std::int64_t first = 0;
  std::int64_t end = 0;
  for (const std::int32_t offset : lines.offsets) {
    if (offset >= m0 + height) continue;
    const std::int64_t next_end = std::max(m0 + height - offset, height);
    if (!open || next_end > end + height) {
      if (open) close_run(first, end);
      first = next_end - height;
      end = next_end;
      open = true;
    } else if (next_end > end) {
      end += height;
    }
  }
  if (open) close_run(first, end);
  close_run(visible, visible);
  row.gather(gathered);
}

}  // namespace tessera::score
