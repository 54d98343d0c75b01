// The paged cache against a plain array.
#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "tessera/cache.h"

namespace tessera {
namespace {

constexpr std::int64_t kHeads = 3;
constexpr std::int64_t kHeadDim = 5;
constexpr std::int64_t kValueDim = 7;

PagedCacheShape shape_of(DType dtype) {
  return {.layers = 2,
          .kv_heads = kHeads,
          .head_dim = kHeadDim,
          .value_dim = kValueDim,
          .dtype = dtype,
          .page_size = 16,
          .capacity = 1000};
}

/// A number that every dtype holds exactly and that names its place.
float mark(std::int64_t layer, std::int64_t token, std::int64_t head, std::int64_t i) {
  return static_cast<float>((layer * 31 + token * 7 + head * 3 + i) % 127);
}

void append(PagedCache& cache, std::int64_t first, std::int64_t count) {
  cache.grow_to(first + count);
  for (std::int64_t layer = 0; layer < 2; ++layer) {
    std::vector<float> keys;
    std::vector<float> values;
    for (std::int64_t token = first; token < first + count; ++token) {
      for (std::int64_t head = 0; head < kHeads; ++head) {
        for (std::int64_t i = 0; i < kHeadDim; ++i) keys.push_back(mark(layer, token, head, i));
        for (std::int64_t i = 0; i < kValueDim; ++i) values.push_back(-mark(layer, token, head, i));
      }
    }
    cache.write(layer, first, count, keys.data(), values.data());
  }
  cache.set_tokens(first + count);
}

void expect_content(const PagedCache& cache) {
  const PageTable pages = cache.page_table();
  EXPECT_EQ(static_cast<std::int64_t>(pages.table.size()), pages.pages_per_sequence);
  for (std::int64_t layer = 0; layer < 2; ++layer) {
    const TensorView keys = cache.keys(layer);
    const TensorView values = cache.values(layer);
    for (std::int64_t token = 0; token < cache.tokens(); ++token) {
      const std::int64_t page = pages.table[static_cast<std::size_t>(token / pages.page_size)];
      for (std::int64_t head = 0; head < kHeads; ++head) {
        for (std::int64_t i = 0; i < kValueDim; ++i) {
          const float expected = mark(layer, token, head, i);
          EXPECT_EQ(load_as_float(values.row(page, head, token % pages.page_size), values.dtype, i), -expected);
          if (i >= kHeadDim) continue;
          EXPECT_EQ(load_as_float(keys.row(page, head, token % pages.page_size), keys.dtype, i), expected);
        }
      }
    }
  }
}

TEST(PagedCacheTest, HoldsWhatWasWritten) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    PagedCache cache(shape_of(dtype));
    EXPECT_EQ(cache.memory_bytes(), 0U);
    std::int64_t tokens = 0;
    for (const std::int64_t count : {1, 15, 1, 40, 16, 3}) {
      const void* before = cache.keys(0).data;
      append(cache, tokens, count);
      tokens += count;
      EXPECT_EQ(cache.keys(0).data, before);
      EXPECT_EQ(cache.tokens(), tokens);
      EXPECT_EQ(cache.pages(), (tokens + 15) / 16);
      EXPECT_EQ(cache.memory_bytes(), cache.pages() * 16 * kHeads * (kHeadDim + kValueDim) * 2 * size_of(dtype));
    }
    expect_content(cache);
    cache.reset();
    EXPECT_EQ(cache.memory_bytes(), 0U);
    append(cache, 0, 33);
    PagedCache moved = std::move(cache);
    expect_content(moved);
  }
}

TEST(PagedCacheTest, ChecksItsSizes) {
  PagedCache cache(shape_of(DType::f32));
  EXPECT_THROW(cache.grow_to(1001), Error);
  cache.grow_to(1000);
  const auto refuses = [](auto change) {
    PagedCacheShape shape = shape_of(DType::f32);
    change(shape);
    EXPECT_THROW(PagedCache{shape}, Error);
  };
  refuses([](PagedCacheShape& shape) { shape.page_size = 24; });
  refuses([](PagedCacheShape& shape) { shape.page_size = 0; });
  refuses([](PagedCacheShape& shape) { shape.dtype = DType::i32; });
  refuses([](PagedCacheShape& shape) { shape.capacity = 0; });
  refuses([](PagedCacheShape& shape) { shape.capacity = std::int64_t{1} << 60; });
  refuses([](PagedCacheShape& shape) { shape.layers = -1; });
}

}  // namespace
}  // namespace tessera
