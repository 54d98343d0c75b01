#include "cache/head_pages.h"

#include <algorithm>
#include <cassert>
#include <cstring>

#include "core/convert.h"
#include "core/error.h"

namespace tessera {

namespace {

std::size_t pool_bytes(const LayerCacheShape& shape, std::int64_t dim) {
  // The checks of sizes are those of the cache that holds every token.
  const PagedCache checked(shape.pages());
  const std::int64_t pages = shape.kv_heads * ((shape.capacity + shape.page_size - 1) / shape.page_size);
  return static_cast<std::size_t>(pages * shape.page_size * dim) * size_of(shape.dtype);
}

}  // namespace

HeadPages::HeadPages(const LayerCacheShape& shape)
    : shape_(shape),
      keys_(pool_bytes(shape, shape.head_dim)),
      values_(pool_bytes(shape, shape.value_dim)),
      heads_(static_cast<std::size_t>(shape.kv_heads)) {}

std::size_t HeadPages::page_bytes(std::int64_t dim) const {
  return static_cast<std::size_t>(shape_.page_size * dim) * size_of(shape_.dtype);
}

std::int64_t HeadPages::longest() const {
  std::int64_t longest = 0;
  for (const Head& head : heads_) longest = std::max(longest, std::ssize(head.positions));
  return longest;
}

std::int64_t HeadPages::rows() const {
  std::int64_t rows = 0;
  for (const Head& head : heads_) rows += std::ssize(head.positions);
  return rows;
}

std::size_t HeadPages::memory_bytes() const {
  return static_cast<std::size_t>(pool_pages_) * (page_bytes(shape_.head_dim) + page_bytes(shape_.value_dim)) +
         static_cast<std::size_t>(rows()) * sizeof(std::int32_t);
}

std::byte* HeadPages::row(const AddressRange& pool, std::int64_t dim, std::int64_t head, std::int64_t slot) const {
  const std::int64_t page =
      heads_[static_cast<std::size_t>(head)].pages[static_cast<std::size_t>(slot / shape_.page_size)];
  const std::int64_t row = page * shape_.page_size + slot % shape_.page_size;
  return pool.data() + row * dim * static_cast<std::int64_t>(size_of(shape_.dtype));
}

std::int32_t HeadPages::new_page() {
  if (!free_.empty()) {
    const std::int32_t page = free_.back();
    free_.pop_back();
    return page;
  }
  keys_.commit(static_cast<std::size_t>(pool_pages_ + 1) * page_bytes(shape_.head_dim));
  values_.commit(static_cast<std::size_t>(pool_pages_ + 1) * page_bytes(shape_.value_dim));
  return static_cast<std::int32_t>(pool_pages_++);
}

void HeadPages::append_stored(std::int64_t head, std::int64_t position, const std::byte* key, const std::byte* value) {
  Head& own = heads_[static_cast<std::size_t>(head)];
  const std::int64_t slot = std::ssize(own.positions);
  require(slot < shape_.capacity, "the cache was made for {} tokens; {} do not fit", shape_.capacity, slot + 1);
  if (slot == std::ssize(own.pages) * shape_.page_size) {
    own.pages.push_back(new_page());
    rebuild_table();
  }
  own.positions.push_back(static_cast<std::int32_t>(position));
  const std::size_t element = size_of(shape_.dtype);
  std::memcpy(key_row(head, slot), key, static_cast<std::size_t>(shape_.head_dim) * element);
  std::memcpy(value_row(head, slot), value, static_cast<std::size_t>(shape_.value_dim) * element);
}

void HeadPages::append(std::int64_t head, std::int64_t position, const float* key, const float* value) {
  const std::size_t element = size_of(shape_.dtype);
  std::vector<std::byte> stored(static_cast<std::size_t>(shape_.head_dim + shape_.value_dim) * element);
  std::byte* stored_value = stored.data() + static_cast<std::size_t>(shape_.head_dim) * element;
  from_float(key, shape_.head_dim, shape_.dtype, stored.data());
  from_float(value, shape_.value_dim, shape_.dtype, stored_value);
  append_stored(head, position, stored.data(), stored_value);
}

void HeadPages::drop_last(std::int64_t head) {
  Head& own = heads_[static_cast<std::size_t>(head)];
  own.positions.pop_back();
  const std::int64_t needed = (std::ssize(own.positions) + shape_.page_size - 1) / shape_.page_size;
  while (std::ssize(own.pages) > needed) {
    free_.push_back(own.pages.back());
    own.pages.pop_back();
  }
}

void HeadPages::replace_by_last(std::int64_t head, std::int64_t slot) {
  Head& own = heads_[static_cast<std::size_t>(head)];
  const std::int64_t last = std::ssize(own.positions) - 1;
  assert(slot >= 0 && slot <= last);
  if (slot < last) {
    const std::size_t element = size_of(shape_.dtype);
    std::memcpy(key_row(head, slot), key_row(head, last), static_cast<std::size_t>(shape_.head_dim) * element);
    std::memcpy(value_row(head, slot), value_row(head, last), static_cast<std::size_t>(shape_.value_dim) * element);
    own.positions[static_cast<std::size_t>(slot)] = own.positions.back();
  }
  drop_last(head);
}

void HeadPages::keep(std::int64_t head, std::span<const std::int32_t> slots) {
  Head& own = heads_[static_cast<std::size_t>(head)];
  const auto key_bytes = static_cast<std::size_t>(shape_.head_dim) * size_of(shape_.dtype);
  const auto value_bytes = static_cast<std::size_t>(shape_.value_dim) * size_of(shape_.dtype);
  // Through a copy: slots may come in any order.
  std::vector<std::byte> rows(slots.size() * (key_bytes + value_bytes));
  std::vector<std::int32_t> positions;
  positions.reserve(slots.size());
  std::byte* next = rows.data();
  for (const std::int32_t slot : slots) {
    assert(slot >= 0 && slot < std::ssize(own.positions));
    std::memcpy(next, key_row(head, slot), key_bytes);
    std::memcpy(next + key_bytes, value_row(head, slot), value_bytes);
    positions.push_back(own.positions[static_cast<std::size_t>(slot)]);
    next += key_bytes + value_bytes;
  }
  next = rows.data();
  for (std::int64_t slot = 0; slot < std::ssize(positions); ++slot) {
    std::memcpy(key_row(head, slot), next, key_bytes);
    std::memcpy(value_row(head, slot), next + key_bytes, value_bytes);
    next += key_bytes + value_bytes;
  }
  while (own.positions.size() > positions.size()) drop_last(head);
  own.positions = std::move(positions);
}

void HeadPages::release_unused() {
  const std::int64_t used = pool_pages_ - std::ssize(free_);
  std::vector<std::int32_t> holes;
  for (const std::int32_t page : free_) {
    if (page < used) holes.push_back(page);
  }
  for (Head& head : heads_) {
    for (std::int32_t& page : head.pages) {
      if (page < used) continue;
      const std::int32_t hole = holes.back();
      holes.pop_back();
      for (const auto& [pool, dim] : {std::pair(&keys_, shape_.head_dim), std::pair(&values_, shape_.value_dim)}) {
        std::memcpy(pool->data() + static_cast<std::size_t>(hole) * page_bytes(dim),
                    pool->data() + static_cast<std::size_t>(page) * page_bytes(dim), page_bytes(dim));
      }
      page = hole;
    }
  }
  assert(holes.empty());
  free_.clear();
  pool_pages_ = used;
  keys_.shrink(static_cast<std::size_t>(used) * page_bytes(shape_.head_dim));
  values_.shrink(static_cast<std::size_t>(used) * page_bytes(shape_.value_dim));
  rebuild_table();
}

void HeadPages::reset() {
  heads_.assign(heads_.size(), {});
  free_.clear();
  pool_pages_ = 0;
  keys_.release();
  values_.release();
  rebuild_table();
}

void HeadPages::rebuild_table() {
  table_width_ = 0;
  for (const Head& head : heads_) table_width_ = std::max(table_width_, std::ssize(head.pages));
  table_.assign(heads_.size() * static_cast<std::size_t>(table_width_), 0);
  for (std::size_t h = 0; h < heads_.size(); ++h) {
    std::copy(heads_[h].pages.begin(), heads_[h].pages.end(),
              table_.begin() + static_cast<std::ptrdiff_t>(h) * table_width_);
  }
}

TensorView HeadPages::view_of_pool(const AddressRange& pool, std::int64_t dim) const {
  return view_of(pool.data(), shape_.dtype, {pool_pages_, 1, shape_.page_size, dim});
}

AttentionInputs HeadPages::inputs() const {
  AttentionInputs inputs;
  inputs.k = view_of_pool(keys_, shape_.head_dim);
  inputs.v = view_of_pool(values_, shape_.value_dim);
  inputs.pages = {.table = table_, .pages_per_sequence = table_width_, .page_size = shape_.page_size};
  return inputs;
}

AttentionInputs HeadPages::inputs_of_head(std::int64_t head) const {
  AttentionInputs one = inputs();
  one.pages.table =
      one.pages.table.subspan(static_cast<std::size_t>(head * table_width_), static_cast<std::size_t>(table_width_));
  return one;
}

}  // namespace tessera
