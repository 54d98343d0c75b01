// Sizes and scratch layout of a call.
#include "kernels/cpu/tile.h"

#include <algorithm>

namespace tessera::kernels {

namespace {

std::int64_t round_up(std::int64_t value, std::int64_t unit) {
  return (value + unit - 1) / unit * unit;
}

/// Hands out 64-byte aligned pieces of a buffer; with a null buffer it only counts.
class Carver {
 public:
  explicit Carver(std::byte* memory) : memory_(memory) {}

  template <class T>
  T* take(std::int64_t count) {
    T* piece = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + used_);
    used_ += static_cast<std::size_t>(round_up(count * static_cast<std::int64_t>(sizeof(T)), 64));
    return piece;
  }
  std::size_t used() const { return used_; }

 private:
  std::byte* memory_;
  std::size_t used_ = 0;
};

std::size_t carve(const TileShape& shape, bool with_queries, std::byte* memory, TileScratch& scratch) {
  Carver carver(memory);
  const std::int64_t rows = with_queries ? kTileRows : 0;
  scratch.q_stride = round_up(shape.compute_words, 16);
  scratch.q = carver.take<std::uint32_t>(rows * scratch.q_stride);
  scratch.scores = carver.take<float>(kTileRows * kBlockKeys);
  scratch.probabilities = carver.take<float>(kTileRows * kBlockKeys);
  scratch.output = carver.take<float>(rows * shape.value_columns);
  scratch.k = carver.take<std::uint32_t>(kBlockGroups * shape.k_compute_panel);
  scratch.v = carver.take<std::uint32_t>(kBlockGroups * shape.v_panel);
  scratch.k_storage = carver.take<std::uint32_t>(shape.k_storage_panel);
  scratch.zero_row = carver.take<std::byte>(4 * std::max(shape.head_dim, shape.value_dim));
  return carver.used();
}

}  // namespace

TileShape tile_shape_of(const Problem& problem, DType dtype, bool pair_product) {
  TileShape shape{};
  shape.head_dim = problem.head_dim;
  shape.value_dim = problem.value_dim;
  shape.dtype = dtype;
  shape.pair_product = pair_product;
  shape.storage_words = dtype == DType::f32 ? problem.head_dim : (problem.head_dim + 1) / 2;
  shape.compute_words = pair_product          ? shape.storage_words
                        : dtype == DType::f32 ? problem.head_dim
                                              : 2 * shape.storage_words;
  shape.value_columns = round_up(problem.value_dim, 16);
  // Panels are packed 16 words at a time: whole blocks, even where the last words are padding.
  shape.k_storage_panel = round_up(shape.storage_words, 16) * kGroupKeys;
  shape.k_compute_panel = round_up(shape.compute_words, 16) * kGroupKeys;
  shape.v_panel = shape.value_columns * kGroupKeys / (pair_product ? 2 : 1);
  return shape;
}

std::size_t scratch_bytes(const TileShape& shape, bool with_queries) {
  TileScratch unused{};
  return carve(shape, with_queries, nullptr, unused);
}

void place_scratch(const TileShape& shape, bool with_queries, std::byte* memory, TileScratch& scratch) {
  carve(shape, with_queries, memory, scratch);
  scratch.group_count = 0;
  scratch.any_masked = false;
  scratch.tile_peak = nullptr;
  scratch.tile_peak_count = 0;
  scratch.skipped_pairs = 0;
  scratch.next_count = 0;
  std::fill_n(scratch.zero_row, 4 * std::max(shape.head_dim, shape.value_dim), std::byte{0});
}

std::int64_t key_major_accumulator_floats(const TileShape& shape, std::int64_t rows) {
  return rows * (round_up(shape.compute_words, 16) + shape.value_columns + 2);
}

}  // namespace tessera::kernels
