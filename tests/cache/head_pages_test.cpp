// Pages per head against plain lists.
#include "cache/head_pages.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <random>
#include <vector>

namespace tessera {
namespace {

constexpr std::int64_t kHeadDim = 5;
constexpr std::int64_t kValueDim = 7;

LayerCacheShape shape_of(DType dtype) {
  return {.q_heads = 6,
          .kv_heads = 3,
          .head_dim = kHeadDim,
          .value_dim = kValueDim,
          .dtype = dtype,
          .page_size = 16,
          .capacity = 1000};
}

/// A number that every dtype holds exactly and that names its place.
float mark(std::int64_t head, std::int64_t position, std::int64_t i) {
  return static_cast<float>((position * 7 + head * 31 + i) % 127);
}

void append(HeadPages& pages, std::int64_t head, std::int64_t position) {
  std::vector<float> key;
  std::vector<float> value;
  for (std::int64_t i = 0; i < kHeadDim; ++i) key.push_back(mark(head, position, i));
  for (std::int64_t i = 0; i < kValueDim; ++i) value.push_back(-mark(head, position, i));
  pages.append(head, position, key.data(), value.data());
}

using Lists = std::vector<std::vector<std::int32_t>>;

void expect_content(const HeadPages& pages, const Lists& lists) {
  const AttentionInputs all = pages.inputs();
  std::int64_t rows = 0;
  for (std::int64_t head = 0; head < std::ssize(lists); ++head) {
    const auto& list = lists[static_cast<std::size_t>(head)];
    const auto positions = pages.positions(head);
    ASSERT_EQ(std::vector<std::int32_t>(positions.begin(), positions.end()), list);
    rows += std::ssize(list);
    const AttentionInputs one = pages.inputs_of_head(head);
    for (std::int64_t slot = 0; slot < std::ssize(list); ++slot) {
      const auto table_row = static_cast<std::size_t>(head * all.pages.pages_per_sequence);
      const std::int64_t page = all.pages.table[table_row + static_cast<std::size_t>(slot / 16)];
      ASSERT_EQ(one.pages.table[static_cast<std::size_t>(slot / 16)], page);
      const std::int32_t position = list[static_cast<std::size_t>(slot)];
      for (std::int64_t i = 0; i < kValueDim; ++i) {
        ASSERT_EQ(load_as_float(all.v.row(page, 0, slot % 16), all.v.dtype, i), -mark(head, position, i));
        if (i < kHeadDim) {
          ASSERT_EQ(load_as_float(all.k.row(page, 0, slot % 16), all.k.dtype, i), mark(head, position, i));
        }
      }
    }
  }
  EXPECT_EQ(pages.rows(), rows);
}

TEST(HeadPagesTest, HoldsUnequalListsThroughAnyChanges) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    HeadPages pages(shape_of(dtype));
    Lists lists(3);
    std::mt19937 random(7);
    std::int32_t position = 0;
    for (int step = 0; step < 300; ++step) {
      const auto head = static_cast<std::int64_t>(random() % 3);
      auto& list = lists[static_cast<std::size_t>(head)];
      const auto action = random() % 10;
      if (action < 7 || list.empty()) {
        for (std::uint32_t i = 0; i < 1 + random() % 20 && list.size() < 900; ++i) {
          append(pages, head, position);
          list.push_back(position++);
        }
      } else if (action == 7) {
        const auto slot = static_cast<std::int64_t>(random() % list.size());
        pages.replace_by_last(head, slot);
        list[static_cast<std::size_t>(slot)] = list.back();
        list.pop_back();
      } else {
        std::vector<std::int32_t> slots;
        for (std::int32_t slot = 0; slot < std::ssize(list); ++slot) {
          if (random() % 3 != 0) slots.push_back(slot);
        }
        if (action == 9) std::shuffle(slots.begin(), slots.end(), random);
        pages.keep(head, slots);
        std::vector<std::int32_t> kept;
        kept.reserve(slots.size());
        for (const std::int32_t slot : slots) kept.push_back(list[static_cast<std::size_t>(slot)]);
        list = kept;
        if (random() % 2 == 0) pages.release_unused();
      }
    }
    expect_content(pages, lists);
    pages.release_unused();
    expect_content(pages, lists);
    std::size_t used = 0;
    for (const auto& list : lists) used += (list.size() + 15) / 16;
    EXPECT_EQ(pages.memory_bytes(), used * 16 * (kHeadDim + kValueDim) * size_of(dtype) +
                                        static_cast<std::size_t>(pages.rows()) * sizeof(std::int32_t));
    pages.reset();
    EXPECT_EQ(pages.memory_bytes(), 0U);
    append(pages, 1, 5);
    expect_content(pages, {{}, {5}, {}});
  }
}

TEST(HeadPagesTest, ChecksItsSizes) {
  HeadPages pages(shape_of(DType::f32));
  for (std::int64_t i = 0; i < 1000; ++i) append(pages, 0, i);
  EXPECT_THROW(append(pages, 0, 1000), Error);
  LayerCacheShape shape = shape_of(DType::f32);
  shape.page_size = 24;
  EXPECT_THROW(HeadPages{shape}, Error);
  shape = shape_of(DType::i32);
  EXPECT_THROW(HeadPages{shape}, Error);
}

}  // namespace
}  // namespace tessera
