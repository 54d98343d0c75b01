// What caches that evict share: a list of kept rows per kv head, once the prompt is in.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "methods/prompt_first_cache.h"

namespace tessera {

/// What the queries of a kv head see of its rows: all up to their own, or the first `sinks` tokens of the sequence and
/// the `recent` tokens up to their own.
struct HeadWindow {
  bool limited = false;
  std::int64_t sinks = 0;
  std::int64_t recent = 0;
};

/// Attention of the last `q.tokens()` rows over the rows kept per kv head, causal, with a window per kv head (none:
/// empty). Heads with a window hold their sinks first and then consecutive tokens; they are equally long, and no other
/// head is shorter. `stand_in` (may be null) holds one key per kv head that every query sees besides, where its
/// log-weight is not -inf: k and v [kv_heads, 1, 1, dim]. The plan has the kv heads as sequences of one kv head each.
RunReport attend_kept(const HeadPages& pages, const TensorView& q, std::span<const HeadWindow> windows,
                      const KeySource* stand_in, const AttentionOutputs& outputs, const PlanContext& context,
                      Plan* executed);

/// Prompt rows attend by the prefill method while every token is there; once rows were evicted, new rows of any kind
/// attend to all that is kept. plan() of the method that owns such a cache is dense.
class EvictingCache : public PromptFirstCache {
 public:
  void finish_prefill(const PlanContext& context) final;
  std::int64_t rows_kept() const final { return whole() ? tokens() * shape().kv_heads : pages().rows(); }
  std::size_t memory_bytes() const final { return row_bytes() + bytes_of_notes(); }

 protected:
  /// `prompt_whole`: the prompt is kept until finish_prefill(), which any prefill method needs. If not, rows are kept
  /// per head from the first, prompt rows see what windows() says, and observe_prompt() may evict.
  explicit EvictingCache(const LayerCacheShape& shape, bool prompt_whole = true)
      : PromptFirstCache(shape, prompt_whole) {}

  /// Of each kv head while rows are kept per head; empty: no limits. A single query always sees every row.
  virtual std::span<const HeadWindow> windows() const { return {}; }
  /// What stands for evicted rows, while rows are kept per head; see attend_kept().
  virtual const KeySource* stand_in() const { return nullptr; }
  /// After the attention of prompt rows, or of rows decoded before any prompt. The LSE [q_heads][rows] is that of dense
  /// attention over what is kept; empty when a sparse method ran.
  virtual void observe_prompt(const CacheCall&, std::span<const float>, const PlanContext&) {}
  /// At the end of a prompt: whether rows are evicted at all. If not, everything stays as it is.
  virtual bool evicts() const = 0;
  /// The slots that each kv head keeps then; evict() carries it out.
  virtual KeptSlots choose(const PlanContext& context) = 0;
  /// The rows of these slots are all that is left, in their order.
  virtual void evicted(const KeptSlots&) {}
  /// After the attention of rows decoded while rows are kept per head, with their LSE [q_heads][rows].
  virtual void observe_decode(const CacheCall&, std::span<const float>, const PlanContext&) {}
  virtual std::size_t bytes_of_notes() const { return 0; }

  /// Position of the row in a slot.
  std::int64_t position_of(std::int64_t kv_head, std::int64_t slot) const;
  /// Evicts one row while decoding: the newest one takes its slot.
  void evict_slot(std::int64_t kv_head, std::int64_t slot);
  /// Keeps these rows while the prompt comes in; not whole().
  void keep(const KeptSlots& kept);
  /// Evicts the oldest row whose position is not below `sinks`.
  void evict_oldest(std::int64_t kv_head, std::int64_t sinks);
  /// Slots of a head in the order of their positions: decoding leaves them in another.
  std::vector<std::int32_t> slots_by_position(std::int64_t kv_head) const;
  /// Brings the rows of all heads into that order.
  void sort_slots();

  RunReport attend_kept_rows(const CacheCall& call, const PlanContext& context) override;

 private:
  void observe(const CacheCall& call, std::span<const float> lse, const PlanContext& context) final;
};

}  // namespace tessera
