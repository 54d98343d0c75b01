// Attention computed straight from quantised keys and values (cache/quantized_store.h).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cache/quantized_store.h"
#include "tessera/attention.h"

namespace tessera::kernels {

/// Quantised tokens of one kv head: batches of keys, and of values with as many tokens each, in any formats.
struct QuantizedHead {
  std::vector<QuantizedTiles> keys;
  std::vector<QuantizedTiles> values;
};

struct QuantizedProblem {
  std::int64_t rows = 0;  ///< query rows per kv head, all of which see every quantised token
  std::int64_t head_dim = 0;
  std::int64_t value_dim = 0;
  float scale = 1;
};

/// o [heads][rows][value_dim] and natural-log LSE [heads][rows] of queries [heads][rows][head_dim]; a head without
/// tokens yields 0 and -inf. Products are of integers: queries and probabilities, with the scales in them, become
/// numbers of 15 bits per row and block (22 bits beside codes of 8 bits), which is below a hundredth of what the codes
/// lost; sums are exact. Results do not depend on the number of threads.
void attend_quantized(const QuantizedProblem& problem, std::span<const QuantizedHead> heads, const float* queries,
                      float* o, float* lse, const RunOptions& options);

}  // namespace tessera::kernels
