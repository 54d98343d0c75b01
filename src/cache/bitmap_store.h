// Keys or values of one kv head with most numbers gone: bitmaps and what is left (Mustafar, arXiv:2505.22913).
//
// 64 tokens make a group, and a group is a list of tiles of 64 numbers. Key tiles hold one channel of the 64 tokens,
// channel after channel; value tiles hold 64 channels of one token, slab of 64 channels after slab, token after token.
// Either way a product walks its reduction from tile to tile. A tile is a bitmap, bit i for element i, and its numbers
// in order, filled up with zeros to a multiple of 8.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "tessera/core.h"

namespace tessera {

constexpr std::int64_t kBitmapTile = 64;

/// Compressed groups as kernels read them.
struct BitmapTiles {
  const std::uint64_t* bitmaps = nullptr;
  const std::uint32_t* offsets = nullptr;  ///< of each tile's numbers, in units of 8
  const std::byte* numbers = nullptr;      ///< 16 more may be read behind the last
  std::int64_t groups = 0;
};

class BitmapStore {
 public:
  enum class Orientation : std::uint8_t { keys, values };

  BitmapStore(Orientation orientation, std::int64_t dim, DType dtype)
      : orientation_(orientation), dim_(dim), dtype_(dtype) {}

  /// Tiles of a group of 64 tokens.
  std::int64_t tiles_per_group() const {
    return orientation_ == Orientation::keys ? dim_ : (dim_ + kBitmapTile - 1) / kBitmapTile * kBitmapTile;
  }
  /// Compresses `groups` x 64 rows of `dim` floats; zeros are what is gone.
  void append(std::int64_t groups, const float* rows);
  /// What was appended at call `index`, as rows [tokens][dim].
  std::vector<float> expand(std::size_t index) const;

  std::size_t batches() const { return batches_.size(); }
  BitmapTiles tiles(std::size_t batch) const;
  std::int64_t tokens() const { return tokens_; }
  std::size_t memory_bytes() const;
  void clear();

 private:
  struct Batch {
    std::int64_t groups;
    std::vector<std::uint64_t> bitmaps;
    std::vector<std::uint32_t> offsets;
    std::vector<std::byte> numbers;
  };
  /// Place of an element of tile `tile` of a group: token * dim + channel, or -1 beyond the last channel.
  std::int64_t place(std::int64_t tile, std::int64_t element) const;

  Orientation orientation_;
  std::int64_t dim_;
  DType dtype_;
  std::vector<Batch> batches_;
  std::int64_t tokens_ = 0;
};

/// Sets all but the largest numbers of a row to 0: keeps |x| >= the n-th smallest |x|, n = max(1, floor(sparsity *
/// count)), so that ties keep more. NaN is kept.
void prune_by_magnitude(std::span<float> row, double sparsity);

}  // namespace tessera
