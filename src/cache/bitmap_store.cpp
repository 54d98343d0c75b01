#include "cache/bitmap_store.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace tessera {

namespace {

constexpr std::size_t kPadding = 8;      // numbers of a tile fill up to this
constexpr std::size_t kReadBeyond = 16;  // a kernel's load may begin at the last number

}  // namespace

std::int64_t BitmapStore::place(std::int64_t tile, std::int64_t element) const {
  if (orientation_ == Orientation::keys) return element * dim_ + tile;
  const std::int64_t channel = tile / kBitmapTile * kBitmapTile + element;
  return channel < dim_ ? tile % kBitmapTile * dim_ + channel : -1;
}

void BitmapStore::append(std::int64_t groups, const float* rows) {
  const std::int64_t tiles = tiles_per_group();
  Batch batch{groups, {}, {}, {}};
  batch.bitmaps.reserve(static_cast<std::size_t>(groups * tiles));
  batch.offsets.reserve(static_cast<std::size_t>(groups * tiles));
  std::vector<float> left;
  for (std::int64_t group = 0; group < groups; ++group, rows += kBitmapTile * dim_) {
    for (std::int64_t tile = 0; tile < tiles; ++tile) {
      std::uint64_t bitmap = 0;
      batch.offsets.push_back(static_cast<std::uint32_t>(left.size() / kPadding));
      for (std::int64_t element = 0; element < kBitmapTile; ++element) {
        const std::int64_t at = place(tile, element);
        if (at < 0 || rows[at] == 0) continue;
        bitmap |= std::uint64_t{1} << element;
        left.push_back(rows[at]);
      }
      batch.bitmaps.push_back(bitmap);
      left.resize((left.size() + kPadding - 1) / kPadding * kPadding, 0.0F);
    }
  }
  const std::size_t size = size_of(dtype_);
  batch.numbers.resize((left.size() + kReadBeyond) * size);
  for (std::size_t i = 0; i < left.size(); ++i) {
    store_from_float(batch.numbers.data(), dtype_, static_cast<std::int64_t>(i), left[i]);
  }
  batches_.push_back(std::move(batch));
  tokens_ += groups * kBitmapTile;
}

std::vector<float> BitmapStore::expand(std::size_t index) const {
  const Batch& batch = batches_[index];
  const std::int64_t tiles = tiles_per_group();
  std::vector<float> rows(static_cast<std::size_t>(batch.groups * kBitmapTile * dim_), 0.0F);
  for (std::int64_t group = 0; group < batch.groups; ++group) {
    for (std::int64_t tile = 0; tile < tiles; ++tile) {
      const auto i = static_cast<std::size_t>(group * tiles + tile);
      auto next = static_cast<std::int64_t>(batch.offsets[i] * kPadding);
      for (std::int64_t element = 0; element < kBitmapTile; ++element) {
        if ((batch.bitmaps[i] >> element & 1U) == 0) continue;
        rows[static_cast<std::size_t>(group * kBitmapTile * dim_ + place(tile, element))] =
            load_as_float(batch.numbers.data(), dtype_, next++);
      }
    }
  }
  return rows;
}

BitmapTiles BitmapStore::tiles(std::size_t batch) const {
  const Batch& b = batches_[batch];
  return {b.bitmaps.data(), b.offsets.data(), b.numbers.data(), b.groups};
}

std::size_t BitmapStore::memory_bytes() const {
  std::size_t bytes = 0;
  for (const Batch& batch : batches_) {
    bytes += batch.bitmaps.capacity() * sizeof(std::uint64_t) + batch.offsets.capacity() * sizeof(std::uint32_t) +
             batch.numbers.capacity();
  }
  return bytes;
}

void BitmapStore::clear() {
  std::vector<Batch>().swap(batches_);
  tokens_ = 0;
}

void prune_by_magnitude(std::span<float> row, double sparsity) {
  const auto smallest = std::max<std::size_t>(1, static_cast<std::size_t>(sparsity * static_cast<double>(row.size())));
  std::vector<float> magnitudes(row.size());
  // NaN has no place in an order of magnitudes; as the largest of all it is kept.
  std::transform(row.begin(), row.end(), magnitudes.begin(),
                 [](float x) { return std::isnan(x) ? std::numeric_limits<float>::infinity() : std::fabs(x); });
  const auto nth = magnitudes.begin() + static_cast<std::ptrdiff_t>(std::min(smallest, row.size()) - 1);
  std::nth_element(magnitudes.begin(), nth, magnitudes.end());
  const float threshold = *nth;
  for (float& x : row) {
    if (std::fabs(x) < threshold) x = 0;
  }
}

}  // namespace tessera
