// The skeleton of caches with a form of their own: the whole prompt in pages while it comes in, so that any method can
// run it; then rows per kv head, and whatever a method keeps beside them.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cache/head_pages.h"
#include "methods/paged_layer_cache.h"

namespace tessera {

/// Rows of a [1, heads, rows, dim] tensor with the kv heads as batch: [kv_heads, group, rows, dim].
template <class View>
View heads_as_batch(const View& view, std::int64_t kv_heads) {
  View batch = view;
  const std::int64_t group = view.shape[1] / kv_heads;
  batch.shape[0] = kv_heads;
  batch.shape[1] = group;
  batch.strides[0] = group * view.strides[1];
  return batch;
}

/// The queries or outputs [1, q_heads, rows, dim] of kv head `kv_head` alone: [1, group, rows, dim].
TensorView queries_of_kv_head(const TensorView& q, std::int64_t group, std::int64_t kv_head);

class PromptFirstCache : public LayerCache {
 public:
  void append(std::int64_t count, const float* keys, const float* values, int threads) final;
  RunReport attend(const CacheCall& call, const PlanContext& context) final;
  bool truncate(std::int64_t tokens) final;
  void reset() final;
  std::int64_t tokens() const final { return tokens_; }

 protected:
  using KeptSlots = std::vector<std::vector<std::int32_t>>;  ///< [kv_heads]: slots, ascending in position

  /// `prompt_whole`: the prompt is in pages of all heads until keep_only(). If not, rows are kept per head from the
  /// first.
  explicit PromptFirstCache(const LayerCacheShape& shape, bool prompt_whole = true);

  /// Attention of the newest rows once rows are kept per head; outputs.lse is never empty.
  virtual RunReport attend_kept_rows(const CacheCall& call, const PlanContext& context) = 0;
  /// After the attention of every pass. The LSE [q_heads][rows] is that of dense attention over what is kept; empty
  /// when a sparse method ran the prompt.
  virtual void observe(const CacheCall& call, std::span<const float> lse, const PlanContext& context) = 0;
  /// Tokens beyond the first `tokens` never were.
  virtual void truncated(std::int64_t) {}

  const LayerCacheShape& shape() const { return shape_; }
  /// Every token is there, in pages of all heads.
  bool whole() const { return whole_; }
  /// Rows of a kv head, in either place.
  std::int64_t size_of_head(std::int64_t kv_head) const;
  /// The last `rows` queries of the group of a kv head over its rows, causal in slots; inputs without queries.
  Problem problem_of_head(std::int64_t kv_head, std::int64_t rows) const;
  AttentionInputs inputs_of_head(std::int64_t kv_head) const;
  /// The rows in these slots are all that is left, per head from now on; tokens so far cannot be taken back.
  void keep_only(const KeptSlots& kept);
  /// Tokens so far can no longer be taken back.
  void forbid_truncation() { settled_ = tokens_; }

  const HeadPages& pages() const { return pages_; }
  HeadPages& pages() { return pages_; }
  /// Bytes of rows, in either place.
  std::size_t row_bytes() const { return prompt_.memory_bytes() + pages_.memory_bytes(); }

 private:
  RunReport attend_whole(const CacheCall& call, const PlanContext& context) const;

  LayerCacheShape shape_;
  PagedLayerCache prompt_;  ///< every token, while whole_
  HeadPages pages_;
  bool prompt_whole_;
  bool whole_;
  std::int64_t tokens_ = 0;
  std::int64_t settled_ = 0;  ///< tokens that cannot be taken back
};

}  // namespace tessera
