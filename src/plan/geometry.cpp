#include "plan/geometry.h"

namespace tessera {

std::int64_t sum_of_clamped(std::int64_t first, std::int64_t count, std::int64_t limit) {
  const std::int64_t last = first + count - 1;
  const std::int64_t low = std::max<std::int64_t>(first, 0);
  const std::int64_t high = std::min(last, limit);
  std::int64_t sum = 0;
  if (high >= low) {
    // (low + high) or the number of terms is even: halve before multiplying by nothing larger than needed.
    sum = (low + high) * (high - low + 1) / 2;
  }
  sum += std::max<std::int64_t>(0, last - std::max(limit, first - 1)) * limit;
  return sum;
}

std::int64_t pairs_in_window(const Window& window, std::int64_t first_position, std::int64_t rows, std::int64_t begin,
                             std::int64_t end) {
  // Row p sees the keys of [begin, end) below p + right + 1, less those below p - left; both are clamped ramps in p.
  const std::int64_t keys = end - begin;
  const std::int64_t below_right =
      window.right < 0 ? rows * keys : sum_of_clamped(first_position + window.right + 1 - begin, rows, keys);
  const std::int64_t below_left =
      window.left < 0 ? 0 : sum_of_clamped(first_position - window.left - begin, rows, keys);
  return below_right - below_left;
}

}  // namespace tessera
