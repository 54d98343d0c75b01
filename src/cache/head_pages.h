// Keys and values of one layer where every kv head keeps tokens of its own: pages that belong to one head each.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "cache/address_range.h"
#include "tessera/cache.h"

namespace tessera {

/// Per kv head a list of rows (slots 0, 1, ...) with their true positions. Kernels read the heads as the sequences of a
/// batch with one kv head each: the pools are [pages, 1, page_size, dim] and the table has a row per head.
class HeadPages {
 public:
  /// Throws Error for a shape that PagedCache refuses.
  explicit HeadPages(const LayerCacheShape& shape);

  const LayerCacheShape& shape() const { return shape_; }
  std::int64_t size(std::int64_t head) const { return std::ssize(heads_[static_cast<std::size_t>(head)].positions); }
  std::int64_t longest() const;
  std::int64_t rows() const;
  /// True positions of the rows of a head, by slot.
  std::span<const std::int32_t> positions(std::int64_t head) const {
    return heads_[static_cast<std::size_t>(head)].positions;
  }
  /// Bytes of the pages and positions held.
  std::size_t memory_bytes() const;

  /// Adds a row behind the others, rounded to the cache's dtype.
  void append(std::int64_t head, std::int64_t position, const float* key, const float* value);
  /// The same for rows that have the cache's dtype already.
  void append_stored(std::int64_t head, std::int64_t position, const std::byte* key, const std::byte* value);
  /// Moves the last row into `slot`, whose row is forgotten.
  void replace_by_last(std::int64_t head, std::int64_t slot);
  /// Keeps the rows in these slots (distinct), in this order, and forgets the others. release_unused() then gives back
  /// the pages that became free.
  void keep(std::int64_t head, std::span<const std::int32_t> slots);
  /// Closes gaps between the pages in use and returns the rest to the system. Views become invalid.
  void release_unused();
  void reset();

  /// Keys, values and page table with the heads as sequences, without queries; valid until rows are added or removed.
  AttentionInputs inputs() const;
  /// One head alone as a sequence.
  AttentionInputs inputs_of_head(std::int64_t head) const;

 private:
  struct Head {
    std::vector<std::int32_t> pages;
    std::vector<std::int32_t> positions;
  };

  std::size_t page_bytes(std::int64_t dim) const;
  std::int32_t new_page();
  void drop_last(std::int64_t head);
  void rebuild_table();
  std::byte* key_row(std::int64_t head, std::int64_t slot) const { return row(keys_, shape_.head_dim, head, slot); }
  std::byte* value_row(std::int64_t head, std::int64_t slot) const {
    return row(values_, shape_.value_dim, head, slot);
  }
  std::byte* row(const AddressRange& pool, std::int64_t dim, std::int64_t head, std::int64_t slot) const;
  TensorView view_of_pool(const AddressRange& pool, std::int64_t dim) const;

  LayerCacheShape shape_;
  AddressRange keys_;
  AddressRange values_;
  std::int64_t pool_pages_ = 0;  ///< committed
  std::vector<std::int32_t> free_;
  std::vector<Head> heads_;
  std::vector<std::int32_t> table_;  ///< [kv_heads][table_width_]; heads with fewer pages repeat page 0
  std::int64_t table_width_ = 0;
};

}  // namespace tessera
