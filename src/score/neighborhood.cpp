#include "score/neighborhood.h"

namespace tessera::score {

Interval NeighborhoodAxis::keys_of(std::int64_t place, std::int64_t n) const {
  const std::int64_t width = std::min(window, n);
  const std::int64_t step = std::min(stride, std::max<std::int64_t>(width, 1));
  if (n == 0) return {};
  const std::int64_t first_of_group = floor_div(place, step) * step;
  if (causal) {
    const std::int64_t leader = std::min(first_of_group + step - 1, n - 1);
    const std::int64_t begin = std::max<std::int64_t>(0, leader - width + 1);
    return {begin, std::clamp(place + 1, begin, n)};
  }
  // The window is shifted inwards at the borders, so that every query has the same number of keys.
  const std::int64_t left = width / 2;
  const std::int64_t right = left + width % 2 - 1;
  const std::int64_t leader = std::min(first_of_group + step / 2, n - 1);
  const std::int64_t begin = std::clamp(leader, left, n - 1 - right) - left;
  return {begin, begin + width};
}

Interval NeighborhoodAxis::queries_of(std::int64_t place, std::int64_t n) const {
  const std::int64_t width = std::min(window, n);
  const std::int64_t step = std::min(stride, std::max<std::int64_t>(width, 1));
  if (causal) {
    const std::int64_t reach = floor_div(place + width, step) + (place + width >= n ? 1 : 0);
    return {place, std::clamp(reach * step, place, n)};
  }
  const std::int64_t left = width / 2;
  const std::int64_t right = left + width % 2 - 1;
  const std::int64_t offset = step - 1 - step / 2;
  const std::int64_t begin = floor_div(place >= width ? place - right + offset : 0, step) * step;
  const std::int64_t end = place >= n - width ? n : floor_div(place + left + offset + 1, step) * step;
  return {std::clamp<std::int64_t>(begin, 0, n), std::clamp<std::int64_t>(end, 0, n)};
}

bool NeighborhoodAxis::block_sparse(std::int64_t tile_q, std::int64_t tile_k) const {
  for (std::int64_t group = 0; group < groups(); ++group) {
    const std::int64_t n = length_of(group);
    for (std::int64_t first = 0; first < n; first += tile_q) {
      const Interval keys = keys_of(first, n);
      if (!(keys == keys_of(std::min(first + tile_q, n) - 1, n))) return false;
      if (keys.begin % tile_k != 0 || (keys.end % tile_k != 0 && keys.end != n)) return false;
    }
  }
  return true;
}

}  // namespace tessera::score
