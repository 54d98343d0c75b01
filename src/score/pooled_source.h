// Keys and values pooled into a derived key source: the mean of so many keys that follow each other in some order, the
// mean of their values, and the logarithm of their number as log-weight, so that an entry weighs as much as its members
// would if they were alike.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "score/ordered_tiles.h"
#include "tessera/attention.h"

namespace tessera::score {

class PooledSource {
 public:
  /// One entry for every `members` keys of each sequence in the order of `sequences` (one per sequence of the problem);
  /// the last one of a sequence may have fewer. Stored in the dtype of K.
  PooledSource(const Problem& problem, const AttentionInputs& inputs, std::span<const OrderedTiles> sequences,
               std::int64_t members, int threads);

  /// Views of the tensors, for AttentionInputs::sources; valid as long as this object.
  KeySource view() const;

  /// Entries per sequence: what KeySourceInfo::keys must say.
  static std::int64_t entries(const Problem& problem, std::int64_t members);

 private:
  std::array<std::int64_t, 4> k_shape_{};
  std::array<std::int64_t, 4> v_shape_{};
  DType dtype_;
  std::vector<std::byte> k_;
  std::vector<std::byte> v_;
  std::vector<float> log_weight_;
};

/// Adds the gradients of pooled rows, float [batch, kv_heads, entries, dim], to those of their members in the tensor
/// that was pooled, float [B, kv_heads, Nk, dim]: a member of n has the n-th part of its entry's.
void spread_gradients(const Problem& problem, std::span<const OrderedTiles> sequences, std::int64_t members,
                      const TensorView& d_pooled, const MutableTensorView& d_rows, int threads);

/// One OrderedTiles per sequence, the tokens in this order for each grid.
template <class Order>
std::vector<OrderedTiles> ordered_sequences(const Problem& problem, std::int64_t tile_q, std::int64_t tile_k,
                                            const Order& order) {
  std::vector<OrderedTiles> sequences;
  sequences.reserve(static_cast<std::size_t>(problem.batch));
  for (std::int64_t s = 0; s < problem.batch; ++s) {
    sequences.emplace_back(problem, s, order(problem.grid_of(s)), tile_q, tile_k);
  }
  return sequences;
}

}  // namespace tessera::score
