// Rows of Q, K and V as float, wherever they lie: strided, variable-length or paged. Every scorer reads through here.
#pragma once

#include <cstdint>
#include <vector>

#include "tessera/attention.h"

namespace tessera::score {

/// Queries [first, first + count) of (sequence, query head) as float: out [count][head_dim].
void load_queries(const Problem& problem, const AttentionInputs& inputs, std::int64_t sequence, std::int64_t q_head,
                  std::int64_t first, std::int64_t count, float* out);

/// Keys [first, first + count) of (sequence, key/value head) as float: out [count][head_dim].
void load_keys(const Problem& problem, const AttentionInputs& inputs, std::int64_t sequence, std::int64_t kv_head,
               std::int64_t first, std::int64_t count, float* out);

/// Values of the same keys: out [count][value_dim].
void load_values(const Problem& problem, const AttentionInputs& inputs, std::int64_t sequence, std::int64_t kv_head,
                 std::int64_t first, std::int64_t count, float* out);

/// The same keys without a copy where the tensor already holds them as contiguous float rows, else through `buffer`.
/// With `padded` > count the rows [count, padded) are zero.
const float* key_rows(const Problem& problem, const AttentionInputs& inputs, std::int64_t sequence,
                      std::int64_t kv_head, std::int64_t first, std::int64_t count, std::int64_t padded,
                      std::vector<float>& buffer);

}  // namespace tessera::score
