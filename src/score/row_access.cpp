#include "score/row_access.h"

#include <algorithm>

#include "core/convert.h"
#include "kernels/key_rows.h"

namespace tessera::score {

namespace {

/// One conversion per stretch of densely packed rows, one per row otherwise.
void load_rows(const kernels::KeyRows& rows, std::int64_t dim, std::int64_t first, std::int64_t count, float* out) {
  const bool dense = rows.row_bytes == dim * static_cast<std::int64_t>(size_of(rows.dtype));
  for (std::int64_t n = first; n < first + count;) {
    const std::int64_t stretch = dense ? rows.contiguous_from(n, first + count - n) : 1;
    to_float(rows.row(n), rows.dtype, stretch * dim, out);
    out += stretch * dim;
    n += stretch;
  }
}

}  // namespace

void load_queries(const Problem& problem, const AttentionInputs& inputs, std::int64_t sequence, std::int64_t q_head,
                  std::int64_t first, std::int64_t count, float* out) {
  kernels::KeyRows rows;
  rows.dtype = inputs.q.dtype;
  rows.row_bytes = inputs.q.strides[2] * static_cast<std::int64_t>(size_of(inputs.q.dtype));
  rows.base = inputs.q.row(problem.tensor_batch_of(sequence), q_head, problem.q_begin_of(sequence));
  load_rows(rows, problem.head_dim, first, count, out);
}

void load_keys(const Problem& problem, const AttentionInputs& inputs, std::int64_t sequence, std::int64_t kv_head,
               std::int64_t first, std::int64_t count, float* out) {
  load_rows(kernels::key_rows_of(problem, inputs.k, inputs.pages, sequence, kv_head), problem.head_dim, first, count,
            out);
}

void load_values(const Problem& problem, const AttentionInputs& inputs, std::int64_t sequence, std::int64_t kv_head,
                 std::int64_t first, std::int64_t count, float* out) {
  load_rows(kernels::key_rows_of(problem, inputs.v, inputs.pages, sequence, kv_head), problem.value_dim, first, count,
            out);
}

const float* key_rows(const Problem& problem, const AttentionInputs& inputs, std::int64_t sequence,
                      std::int64_t kv_head, std::int64_t first, std::int64_t count, std::int64_t padded,
                      std::vector<float>& buffer) {
  const bool direct = inputs.k.dtype == DType::f32 && !inputs.pages.used() && padded <= count &&
                      inputs.k.strides[2] == problem.head_dim;
  if (direct) {
    const std::int64_t token = problem.kv_begin_of(sequence) + first;
    return reinterpret_cast<const float*>(inputs.k.row(problem.tensor_batch_of(sequence), kv_head, token));
  }
  buffer.resize(static_cast<std::size_t>(std::max(count, padded) * problem.head_dim));
  load_keys(problem, inputs, sequence, kv_head, first, count, buffer.data());
  std::fill(buffer.begin() + count * problem.head_dim, buffer.end(), 0.0F);
  return buffer.data();
}

}  // namespace tessera::score
