// Addresses of the key or value rows of one (sequence, kv head), wherever they lie: strided, variable-length or paged.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "tessera/attention.h"

namespace tessera::kernels {

struct KeyRows {
  const std::byte* base = nullptr;  ///< token 0, or page 0 of the pool
  std::int64_t row_bytes = 0;       ///< distance of consecutive tokens
  DType dtype = DType::f32;
  const std::int32_t* pages = nullptr;  ///< page numbers of this sequence; null: not paged
  std::int64_t page_size = 0;
  std::int64_t page_bytes = 0;

  const std::byte* row(std::int64_t token) const {
    if (pages == nullptr) return base + token * row_bytes;
    return base + pages[token / page_size] * page_bytes + token % page_size * row_bytes;
  }
  /// How many tokens from this one on lie at distance row_bytes.
  std::int64_t contiguous_from(std::int64_t token, std::int64_t wanted) const {
    return pages == nullptr ? wanted : std::min(wanted, page_size - token % page_size);
  }
};

/// Rows of source 0; `tensor` is inputs.k or inputs.v.
inline KeyRows key_rows_of(const Problem& problem, const TensorView& tensor, const PageTable& pages,
                           std::int64_t sequence, std::int64_t kv_head) {
  const auto element = static_cast<std::int64_t>(size_of(tensor.dtype));
  KeyRows rows;
  rows.dtype = tensor.dtype;
  rows.row_bytes = tensor.strides[2] * element;
  if (pages.used()) {
    rows.base = tensor.row(0, kv_head, 0);
    rows.pages = pages.table.data() + sequence * pages.pages_per_sequence;
    rows.page_size = pages.page_size;
    rows.page_bytes = tensor.strides[0] * element;
  } else {
    rows.base = tensor.row(problem.tensor_batch_of(sequence), kv_head, problem.kv_begin_of(sequence));
  }
  return rows;
}

/// Rows of a derived source.
inline KeyRows key_rows_of(const TensorView& tensor, std::int64_t sequence, std::int64_t kv_head) {
  KeyRows rows;
  rows.dtype = tensor.dtype;
  rows.row_bytes = tensor.strides[2] * static_cast<std::int64_t>(size_of(tensor.dtype));
  rows.base = tensor.row(sequence, kv_head, 0);
  return rows;
}

}  // namespace tessera::kernels
