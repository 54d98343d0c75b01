#include <cassert>
#include <limits>
#include <numeric>

#include "cache/address_range.h"
#include "core/convert.h"
#include "core/error.h"
#include "tessera/cache.h"

namespace tessera {

/// The pages of one layer's keys or values.
class PagedCache::Pool : public AddressRange {
 public:
  using AddressRange::AddressRange;
};

namespace {

void check(const PagedCacheShape& shape) {
  require(shape.layers > 0 && shape.kv_heads > 0 && shape.head_dim > 0 && shape.value_dim > 0 && shape.capacity > 0,
          "cache of {} layers, {} kv_heads, head_dim {}, value_dim {}, capacity {}; expected positive sizes",
          shape.layers, shape.kv_heads, shape.head_dim, shape.value_dim, shape.capacity);
  require(is_attention_dtype(shape.dtype), "cache dtype is {}; expected f32, bf16 or f16", name_of(shape.dtype));
  require(shape.page_size > 0 && shape.page_size % 16 == 0, "cache page_size is {}; expected a multiple of 16",
          shape.page_size);
  // Pages are numbered by int32, and one pool must be addressable.
  const auto page = static_cast<double>(shape.page_size);
  const auto pages = static_cast<double>(shape.capacity) / page + 1;
  const auto row = static_cast<double>(shape.kv_heads) * static_cast<double>(std::max(shape.head_dim, shape.value_dim));
  require(pages < 0x1p31 && pages * page * row < 0x1p44, "cache capacity of {} tokens is too large", shape.capacity);
}

}  // namespace

PagedCache::PagedCache(const PagedCacheShape& shape) : shape_(shape) {
  check(shape);
  const auto pages = static_cast<std::size_t>((shape.capacity + shape.page_size - 1) / shape.page_size);
  for (std::int64_t layer = 0; layer < shape.layers; ++layer) {
    keys_.emplace_back(pages * page_bytes(shape.head_dim));
    values_.emplace_back(pages * page_bytes(shape.value_dim));
  }
}

PagedCache::PagedCache(PagedCache&&) noexcept = default;
PagedCache& PagedCache::operator=(PagedCache&&) noexcept = default;
PagedCache::~PagedCache() = default;

std::size_t PagedCache::page_bytes(std::int64_t dim) const {
  return static_cast<std::size_t>(shape_.kv_heads * shape_.page_size * dim) * size_of(shape_.dtype);
}

std::size_t PagedCache::memory_bytes() const {
  return table_.size() * static_cast<std::size_t>(shape_.layers) *
         (page_bytes(shape_.head_dim) + page_bytes(shape_.value_dim));
}

void PagedCache::grow_to(std::int64_t tokens) {
  require(tokens <= shape_.capacity, "the cache was made for {} tokens; {} do not fit", shape_.capacity, tokens);
  const std::int64_t wanted = (tokens + shape_.page_size - 1) / shape_.page_size;
  if (wanted <= pages()) return;
  for (Pool& pool : keys_) pool.commit(static_cast<std::size_t>(wanted) * page_bytes(shape_.head_dim));
  for (Pool& pool : values_) pool.commit(static_cast<std::size_t>(wanted) * page_bytes(shape_.value_dim));
  const auto before = static_cast<std::int32_t>(table_.size());
  table_.resize(static_cast<std::size_t>(wanted));
  std::iota(table_.begin() + before, table_.end(), before);
}

void PagedCache::write(std::int64_t layer, std::int64_t position, std::int64_t count, const float* keys,
                       const float* values) {
  assert(position >= 0 && position + count <= pages() * shape_.page_size);
  const auto store = [&](const Pool& pool, const float* rows, std::int64_t dim) {
    const auto element = static_cast<std::int64_t>(size_of(shape_.dtype));
    for (std::int64_t token = 0; token < count; ++token) {
      const std::int64_t page = table_[static_cast<std::size_t>((position + token) / shape_.page_size)];
      const std::int64_t slot = (position + token) % shape_.page_size;
      for (std::int64_t head = 0; head < shape_.kv_heads; ++head) {
        const std::int64_t row = (page * shape_.kv_heads + head) * shape_.page_size + slot;
        from_float(rows + (token * shape_.kv_heads + head) * dim, dim, shape_.dtype, pool.data() + row * dim * element);
      }
    }
  };
  store(keys_[static_cast<std::size_t>(layer)], keys, shape_.head_dim);
  store(values_[static_cast<std::size_t>(layer)], values, shape_.value_dim);
}

void PagedCache::set_tokens(std::int64_t tokens) {
  assert(tokens >= 0 && tokens <= pages() * shape_.page_size);
  tokens_ = tokens;
}

void PagedCache::reset() {
  for (Pool& pool : keys_) pool.release();
  for (Pool& pool : values_) pool.release();
  table_.clear();
  tokens_ = 0;
}

TensorView PagedCache::view_of_pool(const Pool& pool, std::int64_t dim) const {
  return view_of(pool.data(), shape_.dtype, {pages(), shape_.kv_heads, shape_.page_size, dim});
}

TensorView PagedCache::keys(std::int64_t layer) const {
  return view_of_pool(keys_[static_cast<std::size_t>(layer)], shape_.head_dim);
}

TensorView PagedCache::values(std::int64_t layer) const {
  return view_of_pool(values_[static_cast<std::size_t>(layer)], shape_.value_dim);
}

PageTable PagedCache::page_table() const {
  return {.table = table_, .pages_per_sequence = pages(), .page_size = shape_.page_size};
}

}  // namespace tessera
