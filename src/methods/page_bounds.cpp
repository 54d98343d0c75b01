#include "methods/page_bounds.h"

#include <algorithm>
#include <limits>

#include "score/product.h"
#include "score/row_access.h"

namespace tessera {

void PageBounds::update(const Problem& problem, const AttentionInputs& inputs, std::int64_t sequence,
                        std::int64_t kv_head, std::int64_t page, std::int64_t settled) {
  head_dim = problem.head_dim;
  const std::int64_t width = 2 * head_dim;
  const std::int64_t keys = problem.kv_len_of(sequence);
  const std::int64_t pages = (keys + page - 1) / page;
  const std::int64_t first_page = std::clamp<std::int64_t>(std::min(known, settled), 0, keys) / page;
  numbers.resize(static_cast<std::size_t>(pages * width));
  std::vector<float> rows(static_cast<std::size_t>(page * head_dim));
  for (std::int64_t b = first_page; b < pages; ++b) {
    const std::int64_t count = std::min(page, keys - b * page);
    score::load_keys(problem, inputs, sequence, kv_head, b * page, count, rows.data());
    float* maxima = numbers.data() + b * width;
    float* minima = maxima + head_dim;
    std::fill(maxima, minima, -std::numeric_limits<float>::infinity());
    std::fill(minima, minima + head_dim, std::numeric_limits<float>::infinity());
    for (std::int64_t row = 0; row < count; ++row) {
      for (std::int64_t d = 0; d < head_dim; ++d) {
        const float x = rows[static_cast<std::size_t>(row * head_dim + d)];
        // A NaN stays: the page's bound becomes NaN, which selection keeps.
        maxima[d] = x > maxima[d] || x != x ? x : maxima[d];
        minima[d] = x < minima[d] || x != x ? x : minima[d];
      }
    }
  }
  known = keys;
}

void PageBounds::upper_bounds(const float* query, std::int64_t pages, std::vector<float>& out) const {
  // max(q M, q m) = max(q, 0) M + min(q, 0) m: one product of rows of twice the length.
  const std::int64_t width = 2 * head_dim;
  std::vector<float> parts(static_cast<std::size_t>(width));
  for (std::int64_t d = 0; d < head_dim; ++d) {
    parts[static_cast<std::size_t>(d)] = std::max(query[d], 0.0F);
    parts[static_cast<std::size_t>(head_dim + d)] = std::min(query[d], 0.0F);
  }
  out.resize(static_cast<std::size_t>(pages));
  if (pages == 0) return;
  score::multiply_transposed(parts.data(), 1, width, numbers.data(), pages, width, width, 1.0F, out.data(), pages);
}

std::vector<PageBounds>& PageBoundsState::of_layer(std::int64_t layer, std::size_t count) {
  if (std::ssize(layers_) <= layer) layers_.resize(static_cast<std::size_t>(layer + 1));
  std::vector<PageBounds>& bounds = layers_[static_cast<std::size_t>(layer)];
  if (bounds.size() != count) bounds.assign(count, {});
  return bounds;
}

std::size_t PageBoundsState::memory_bytes() const {
  std::size_t bytes = 0;
  for (const auto& layer : layers_) {
    for (const PageBounds& bounds : layer) bytes += bounds.numbers.capacity() * sizeof(float);
  }
  return bytes;
}

}  // namespace tessera
