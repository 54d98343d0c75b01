// Attention computed straight from bitmap-compressed keys and values (cache/bitmap_store.h).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cache/bitmap_store.h"
#include "tessera/attention.h"

namespace tessera::kernels {

/// Compressed tokens of one kv head: batches of keys, and of values with as many groups each.
struct BitmapHead {
  std::vector<BitmapTiles> keys;
  std::vector<BitmapTiles> values;
};

struct BitmapProblem {
  std::int64_t rows = 0;  ///< query rows per kv head, all of which see every compressed token
  std::int64_t head_dim = 0;
  std::int64_t value_dim = 0;
  float scale = 1;
  DType dtype = DType::f32;  ///< of the compressed numbers
};

/// o [heads][rows][value_dim] and natural-log LSE [heads][rows] of queries [heads][rows][head_dim]; a head without
/// tokens yields 0 and -inf. float32 throughout. Results do not depend on the number of threads.
void attend_bitmap(const BitmapProblem& problem, std::span<const BitmapHead> heads, const float* queries, float* o,
                   float* lse, const RunOptions& options);

}  // namespace tessera::kernels
