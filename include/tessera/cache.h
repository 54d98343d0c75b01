// Keys and values of the tokens seen so far, in pages.
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

}  // namespace tessera
