// The last queries of a prompt, kept until its end: methods that compress a prompt let them judge its keys.
#pragma once

#include <cstdint>
#include <vector>

#include "tessera/cache.h"

namespace tessera {

/// Holds up to `window` queries, and as many of the passes before the last one in case that one is taken back.
class PromptWindow {
 public:
  PromptWindow(std::int64_t window, const LayerCacheShape& shape)
      : window_(window), q_heads_(shape.q_heads), head_dim_(shape.head_dim) {}

  /// Queries [1, q_heads, rows, head_dim] of the last tokens of `tokens`.
  void observe(const TensorView& q, std::int64_t tokens);
  /// Queries of the last of `tokens` tokens, as far back as they were seen without a gap; at most the window.
  std::int64_t rows(std::int64_t tokens) const;
  /// The last `rows` queries as [1, q_heads, rows, head_dim] of f32.
  TensorView last(std::int64_t rows) const;
  /// Tokens beyond the first `tokens` never were.
  void truncate(std::int64_t tokens);
  void clear();
  std::size_t memory_bytes() const { return queries_.capacity() * sizeof(float); }

 private:
  std::int64_t width() const { return q_heads_ * head_dim_; }

  std::int64_t window_;
  std::int64_t q_heads_;
  std::int64_t head_dim_;
  std::vector<float> queries_;           ///< [rows][q_heads][head_dim]
  std::vector<std::int64_t> positions_;  ///< of these queries, ascending
};

}  // namespace tessera
