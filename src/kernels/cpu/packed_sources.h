// Packing of keys and values for a wave of (sequence, kv head) pairs, within the workspace bound.
#pragma once

#include <vector>

#include "kernels/cpu/tile.h"
#include "kernels/workspace.h"

namespace tessera::kernels {

/// The key sources of the (sequence, kv head) pairs of one wave.
class PackedSources {
 public:
  struct Pair {
    std::int64_t sequence;
    std::int64_t kv_head;
  };
  /// What to pack; `scan` looks for NaN and Inf in the values.
  struct Wish {
    bool keys = false;
    bool values = false;
    bool scan = false;
  };

  PackedSources(const Call& call, const TileShape& shape, const LevelKernels& level, std::vector<Pair> pairs,
                Wish wish);

  /// Sources of the i-th pair: raw first, then the derived ones.
  const PackedSource* of(std::size_t pair) const { return sources_.data() + pair * sources_per_pair_; }
  std::size_t bytes() const { return bytes_; }

  /// Bytes that packing one pair takes.
  static std::size_t bytes_of(const Call& call, const TileShape& shape, std::int64_t sequence, Wish wish);

 private:
  void describe(const Call& call, const Pair& pair, std::size_t index);

  std::vector<PackedSource> sources_;
  std::size_t sources_per_pair_;
  BorrowedBuffer panels_;
  std::vector<std::vector<std::uint8_t>> nonfinite_;
  std::size_t bytes_ = 0;
};

}  // namespace tessera::kernels
