// Bounds of the keys of a page, and of their products with a query.
#pragma once

#include <cstdint>
#include <vector>

#include "tessera/attention.h"
#include "tessera/method.h"

namespace tessera {

/// Per page of consecutive keys and per channel: the largest and the smallest number of one (sequence, kv head).
struct PageBounds {
  std::int64_t head_dim = 0;
  std::int64_t known = 0;      ///< keys that are in, from the first
  std::vector<float> numbers;  ///< [pages][2 * head_dim]: maxima, then minima; slots without a key count in neither

  /// Takes in keys up to kv_len. What is known of the keys before `settled` is used again; those from the page of
  /// `settled` on are read anew, so that keys of a pass that failed leave nothing behind. Pages hold `page` keys.
  void update(const Problem& problem, const AttentionInputs& inputs, std::int64_t sequence, std::int64_t kv_head,
              std::int64_t page, std::int64_t settled);
  /// out[b] = sum over d of max(q_d M_d, q_d m_d), for the first `pages` pages: at least the largest q.k in the page.
  void upper_bounds(const float* query, std::int64_t pages, std::vector<float>& out) const;
};

/// The bounds of the layers of one sequence (or batch), by layer.
class PageBoundsState final : public MethodState {
 public:
  /// [sequence * kv_heads + kv_head] of a layer; as many as asked for.
  std::vector<PageBounds>& of_layer(std::int64_t layer, std::size_t count);
  std::size_t memory_bytes() const override;

 private:
  std::vector<std::vector<PageBounds>> layers_;
};

}  // namespace tessera
