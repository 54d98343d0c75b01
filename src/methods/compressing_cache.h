// What caches that compress share: the oldest tokens in a form of the method's own, the newest ones whole, and one
// softmax over both.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/key_rows.h"
#include "methods/branch_merge.h"
#include "methods/prompt_first_cache.h"

namespace tessera {

/// Where the whole tokens of every kv head lie, the oldest first.
struct WholeRows {
  std::vector<kernels::KeyRows> keys;    ///< [kv_heads]
  std::vector<kernels::KeyRows> values;  ///< [kv_heads]
};

/// Prompt rows attend by the prefill method until the first tokens are compressed; from then on new rows of any kind
/// attend to all that is kept. Tokens are compressed at the end of a prompt and after decoding steps. plan() of the
/// method that owns such a cache is dense.
class CompressingCache : public PromptFirstCache {
 public:
  void finish_prefill(const PlanContext& context) final;
  std::int64_t rows_kept() const final { return tokens() * shape().kv_heads; }
  std::size_t memory_bytes() const final { return row_bytes() + bytes_of_compressed(); }

 protected:
  explicit CompressingCache(const LayerCacheShape& shape) : PromptFirstCache(shape) {}

  /// How many of the `whole` oldest whole tokens are compressed now: at the end of a prompt, or after a decoding step.
  virtual std::int64_t due(std::int64_t whole, bool prompt_ended) const = 0;
  /// Takes the oldest `count` whole tokens over; their rows are given up afterwards.
  virtual void compress(const WholeRows& rows, std::int64_t count, const PlanContext& context) = 0;
  /// Attention of queries [1, q_heads, rows, head_dim] to all compressed tokens.
  virtual void attend_compressed(const TensorView& q, Branch& out, const PlanContext& context) = 0;
  /// After the attention of a pass; see PromptFirstCache::observe().
  virtual void observe_pass(const CacheCall&, std::span<const float>, const PlanContext&) {}
  /// Bytes of the compressed tokens and of notes.
  virtual std::size_t bytes_of_compressed() const = 0;

 private:
  RunReport attend_kept_rows(const CacheCall& call, const PlanContext& context) final;
  void observe(const CacheCall& call, std::span<const float> lse, const PlanContext& context) final;
  void compress_what_is_due(bool prompt_ended, const PlanContext& context);
};

/// Attention of queries [kv_heads, group, rows, dim] to every row of pages whose heads are equally long; `scale` is
/// that of the softmax. Without rows the outputs are 0 and the LSE -inf.
void attend_all_rows(const HeadPages& pages, const TensorView& q, float scale, Branch& out, const RunOptions& options);

/// Queries [1, q_heads, rows, head_dim] as floats [q_heads][rows][head_dim].
std::vector<float> queries_as_float(const TensorView& q);

}  // namespace tessera
