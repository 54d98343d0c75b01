// Keys and values of the tokens seen so far: in pages, and as methods that evict keep them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "tessera/attention.h"
#include "tessera/core.h"

namespace tessera {

/// Shape of the cache of one sequence.
struct PagedCacheShape {
  std::int64_t layers = 1;
  std::int64_t kv_heads = 1;
  std::int64_t head_dim = 0;
  std::int64_t value_dim = 0;
  DType dtype = DType::f32;     ///< f32, bf16 or f16
  std::int64_t page_size = 64;  ///< tokens; a multiple of 16
  std::int64_t capacity = 0;    ///< tokens it can grow to: costs address space, no memory
};

/// Key/value cache of one sequence: per layer a pool of pages [pages, kv_heads, page_size, dim], as
/// AttentionInputs::pages reads them. It grows page by page without moving what it holds.
class PagedCache {
 public:
  /// Throws Error for sizes that are not positive, another dtype or a page size that is no multiple of 16.
  explicit PagedCache(const PagedCacheShape& shape);
  PagedCache(PagedCache&&) noexcept;
  PagedCache& operator=(PagedCache&&) noexcept;
  PagedCache(const PagedCache&) = delete;
  PagedCache& operator=(const PagedCache&) = delete;
  ~PagedCache();

  const PagedCacheShape& shape() const { return shape_; }
  /// Tokens held (appended and committed).
  std::int64_t tokens() const { return tokens_; }
  std::int64_t pages() const { return static_cast<std::int64_t>(table_.size()); }
  /// Bytes of all pages.
  std::size_t memory_bytes() const;

  /// Makes pages for `tokens` tokens in every layer. Throws Error beyond the capacity.
  void grow_to(std::int64_t tokens);
  /// Stores rows for positions [position, position + count) of one layer, rounded to the cache's dtype. `keys` is
  /// [count][kv_heads * head_dim], `values` [count][kv_heads * value_dim]. grow_to() must have made the pages.
  void write(std::int64_t layer, std::int64_t position, std::int64_t count, const float* keys, const float* values);
  /// Declares the first `tokens` tokens present, once all layers have written them.
  void set_tokens(std::int64_t tokens);
  /// Forgets all tokens and gives the memory back.
  void reset();

  /// Views of the pools, [pages, kv_heads, page_size, dim], and the table; valid until the next grow_to() or reset().
  TensorView keys(std::int64_t layer) const;
  TensorView values(std::int64_t layer) const;
  PageTable page_table() const;

 private:
  class Pool;
  std::size_t page_bytes(std::int64_t dim) const;
  TensorView view_of_pool(const Pool& pool, std::int64_t dim) const;

  PagedCacheShape shape_;
  std::vector<Pool> keys_;    ///< per layer
  std::vector<Pool> values_;  ///< per layer
  std::vector<std::int32_t> table_;
  std::int64_t tokens_ = 0;
};

class Method;
struct PlanContext;

/// Shape of the cache of one layer of one sequence.
struct LayerCacheShape {
  std::int64_t q_heads = 1;
  std::int64_t kv_heads = 1;  ///< divides q_heads
  std::int64_t head_dim = 0;
  std::int64_t value_dim = 0;
  DType dtype = DType::f32;     ///< f32, bf16 or f16
  std::int64_t page_size = 64;  ///< tokens; a multiple of 16
  std::int64_t capacity = 0;    ///< tokens of the longest sequence
  /// The method that owns the cache also runs the prompt, so that the cache may evict while the prompt comes in.
  /// Otherwise another method attends to the prompt, and finds every token of it until finish_prefill().
  bool own_prompt = false;
  /// Base of the rotary embedding in the keys, halves paired as in Llama; 0: not known, or none. Caches that give keys
  /// other positions need it.
  double rope_theta = 0;

  std::int64_t group() const { return q_heads / kv_heads; }
  /// Pages that hold every token of the layer.
  PagedCacheShape pages() const { return {1, kv_heads, head_dim, value_dim, dtype, page_size, capacity}; }
};

/// One attention call over a cache: queries of the tokens appended last.
struct CacheCall {
  const Method* method = nullptr;  ///< of the prompt while it comes in, of decoding afterwards; never null
  bool prompt = false;             ///< the queries belong to the prompt
  TensorView q;                    ///< [1, q_heads, rows, head_dim], rows = tokens appended last
  AttentionOutputs outputs;        ///< o [1, q_heads, rows, value_dim]; lse [q_heads, rows] or empty
  Plan* executed = nullptr;        ///< receives the plan if not null; over the kept rows once rows were evicted
};

/// Keys and values of one layer of one sequence, as a method keeps them. A pass over new tokens is append(), as often
/// as suits, then attend() once; finish_prefill() follows the last pass of a prompt. Owned by the session; not
/// thread-safe.
class LayerCache {
 public:
  virtual ~LayerCache() = default;
  /// Adds the next `count` tokens: keys [count][kv_heads * head_dim] with their positions rotated in, values
  /// [count][kv_heads * value_dim]. Throws Error beyond the capacity.
  virtual void append(std::int64_t count, const float* keys, const float* values, int threads) = 0;
  /// Attention of the tokens of this pass over what is kept, causal in true positions.
  virtual RunReport attend(const CacheCall& call, const PlanContext& context) = 0;
  /// The prompt is in: methods that compress it do so now and give memory back.
  virtual void finish_prefill(const PlanContext& context) = 0;
  /// Forgets the tokens beyond the first `tokens`, whose pass failed. False, and nothing done, when older tokens were
  /// evicted since they came: then only reset() helps.
  virtual bool truncate(std::int64_t tokens) = 0;
  /// Forgets everything and gives the memory back.
  virtual void reset() = 0;
  /// Tokens appended.
  virtual std::int64_t tokens() const = 0;
  /// Key/value rows held, summed over the kv heads: tokens() * kv_heads while nothing is evicted.
  virtual std::int64_t rows_kept() const = 0;
  /// Bytes held for keys, values and what the method notes about them.
  virtual std::size_t memory_bytes() const = 0;
};

/// The cache of methods without one of their own: every token in pages, attention by Method::attend.
std::unique_ptr<LayerCache> make_paged_cache(const LayerCacheShape& shape);

}  // namespace tessera
