// Attention problems with random tensors for the tests of scorers and methods, and dense probabilities in float64.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <ostream>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "tessera/attention.h"

namespace tessera::test {

/// Shape of a case. Lists of lengths make a variable-length batch.
struct CaseShape {
  std::string name;
  std::int64_t batch = 1;
  std::int64_t q_heads = 2;
  std::int64_t kv_heads = 1;
  std::int64_t q_len = 0;
  std::int64_t kv_len = 0;
  bool causal = true;
  std::int64_t head_dim = 16;
  DType dtype = DType::f32;
  Layout layout = Layout::bhnd;
  std::int64_t page_size = 0;  ///< 0: not paged
  std::vector<std::int64_t> q_lens = {};
  std::vector<std::int64_t> kv_lens = {};
  std::optional<std::int64_t> q_offset = {};
};
/// What GoogleTest prints of a case: its bytes would differ from run to run.
inline std::ostream& operator<<(std::ostream& out, const CaseShape& shape) {
  return out << shape.name;
}

/// Owns the tensors of one case. Values are set per (sequence, head, token), whatever the layout in memory.
class AttentionCase {
 public:
  explicit AttentionCase(CaseShape shape, std::uint32_t seed = 1) : shape_(std::move(shape)) {
    build_problem();
    const std::int64_t tensor_batch = problem.variable_length() ? 1 : problem.batch;
    allocate(q_, {tensor_batch, problem.q_heads, problem.q_len, problem.head_dim}, shape_.layout);
    if (shape_.page_size > 0) {
      build_pages();
      allocate(k_, {pages_, problem.kv_heads, shape_.page_size, problem.head_dim}, Layout::bhnd);
      allocate(v_, {pages_, problem.kv_heads, shape_.page_size, problem.value_dim}, Layout::bhnd);
    } else {
      allocate(k_, {tensor_batch, problem.kv_heads, problem.kv_len, problem.head_dim}, shape_.layout);
      allocate(v_, {tensor_batch, problem.kv_heads, problem.kv_len, problem.value_dim}, shape_.layout);
    }
    inputs.q = q_.view;
    inputs.k = k_.view;
    inputs.v = v_.view;
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (std::int64_t s = 0; s < problem.batch; ++s) {
      for (std::int64_t h = 0; h < problem.q_heads; ++h) {
        for (std::int64_t n = 0; n < problem.q_len_of(s); ++n) {
          for (std::int64_t d = 0; d < problem.head_dim; ++d) set_q(s, h, n, d, 2 * normal(random));
        }
      }
      for (std::int64_t h = 0; h < problem.kv_heads; ++h) {
        for (std::int64_t n = 0; n < problem.kv_len_of(s); ++n) {
          for (std::int64_t d = 0; d < problem.head_dim; ++d) set_k(s, h, n, d, normal(random));
          for (std::int64_t d = 0; d < problem.value_dim; ++d) store(v_, key_row(v_, s, h, n), d, normal(random));
        }
      }
    }
  }

  void set_q(std::int64_t s, std::int64_t h, std::int64_t n, std::int64_t d, float value) {
    store(q_, query_row(s, h, n), d, value);
  }
  void set_k(std::int64_t s, std::int64_t h, std::int64_t n, std::int64_t d, float value) {
    store(k_, key_row(k_, s, h, n), d, value);
  }
  float q(std::int64_t s, std::int64_t h, std::int64_t n, std::int64_t d) const {
    return load_as_float(query_row(s, h, n), q_.view.dtype, d);
  }
  float k(std::int64_t s, std::int64_t h, std::int64_t n, std::int64_t d) const {
    return load_as_float(key_row(k_, s, h, n), k_.view.dtype, d);
  }

  float v(std::int64_t s, std::int64_t h, std::int64_t n, std::int64_t d) const {
    return load_as_float(key_row(v_, s, h, n), v_.view.dtype, d);
  }

  bool allowed(std::int64_t s, std::int64_t n, std::int64_t j) const {
    return !problem.causal || j <= problem.q_offset_of(s) + n;
  }

  /// softmax(scale * q.k) of one row in float64; all 0 where nothing is visible.
  std::vector<double> probabilities(std::int64_t s, std::int64_t h, std::int64_t n) const {
    const std::int64_t keys = problem.kv_len_of(s);
    std::vector<double> p(static_cast<std::size_t>(keys), 0.0);
    double maximum = -std::numeric_limits<double>::infinity();
    for (std::int64_t j = 0; j < keys; ++j) {
      if (!allowed(s, n, j)) continue;
      for (std::int64_t d = 0; d < problem.head_dim; ++d) {
        p[j] += static_cast<double>(q(s, h, n, d)) * k(s, h / problem.group(), j, d);
      }
      p[j] *= problem.softmax_scale();
      maximum = std::max(maximum, p[j]);
    }
    double sum = 0;
    for (std::int64_t j = 0; j < keys; ++j) {
      p[j] = allowed(s, n, j) ? std::exp(p[j] - maximum) : 0.0;
      sum += p[j];
    }
    for (double& x : p) x = sum > 0 ? x / sum : 0.0;
    return p;
  }

  const CaseShape& shape() const { return shape_; }

  Problem problem;
  AttentionInputs inputs;

 private:
  struct Tensor {
    std::vector<std::uint32_t> storage;  // aligned for every dtype
    MutableTensorView view;
  };

  void build_problem() {
    problem.batch = shape_.q_lens.empty() ? shape_.batch : static_cast<std::int64_t>(shape_.q_lens.size());
    problem.q_heads = shape_.q_heads;
    problem.kv_heads = shape_.kv_heads;
    problem.q_len = shape_.q_len;
    problem.kv_len = shape_.kv_len;
    problem.head_dim = shape_.head_dim;
    problem.value_dim = 8;
    problem.causal = shape_.causal;
    problem.q_offset = shape_.q_offset;
    if (!shape_.q_lens.empty()) {
      problem.cu_seqlens_q.assign(1, 0);
      problem.cu_seqlens_k.assign(1, 0);
      for (const std::int64_t n : shape_.q_lens) problem.cu_seqlens_q.push_back(problem.cu_seqlens_q.back() + n);
      for (const std::int64_t n : shape_.kv_lens) problem.cu_seqlens_k.push_back(problem.cu_seqlens_k.back() + n);
      problem.q_len = problem.cu_seqlens_q.back();
      problem.kv_len = problem.cu_seqlens_k.back();
    }
    problem.validate();
  }

  /// Pages in reverse order with one unused page in front: a reader that ignores the table reads wrong keys.
  void build_pages() {
    const std::int64_t per_sequence = (problem.kv_len + shape_.page_size - 1) / shape_.page_size;
    pages_ = problem.batch * per_sequence + 1;
    for (std::int64_t i = 0; i < problem.batch * per_sequence; ++i) {
      table_.push_back(static_cast<std::int32_t>(pages_ - 1 - i));
    }
    inputs.pages = {.table = table_, .pages_per_sequence = per_sequence, .page_size = shape_.page_size};
  }

  void allocate(Tensor& tensor, std::array<std::int64_t, 4> shape, Layout layout) const {
    tensor.storage.assign(static_cast<std::size_t>(shape[0] * shape[1] * shape[2] * shape[3] + 1), 0);
    tensor.view = mutable_view_of(tensor.storage.data(), shape_.dtype, shape, layout);
  }
  const std::byte* query_row(std::int64_t s, std::int64_t h, std::int64_t n) const {
    return static_cast<TensorView>(q_.view).row(problem.tensor_batch_of(s), h, problem.q_begin_of(s) + n);
  }
  const std::byte* key_row(const Tensor& tensor, std::int64_t s, std::int64_t h, std::int64_t n) const {
    const TensorView view = tensor.view;
    if (shape_.page_size == 0) return view.row(problem.tensor_batch_of(s), h, problem.kv_begin_of(s) + n);
    const std::int64_t page = table_[s * inputs.pages.pages_per_sequence + n / shape_.page_size];
    return view.row(page, h, n % shape_.page_size);
  }
  static void store(Tensor& tensor, const std::byte* row, std::int64_t d, float value) {
    std::byte* begin = reinterpret_cast<std::byte*>(tensor.storage.data());
    store_from_float(begin + (row - begin), tensor.view.dtype, d, value);
  }

  CaseShape shape_;
  Tensor q_, k_, v_;
  std::int64_t pages_ = 0;
  std::vector<std::int32_t> table_;
};

/// Cases that every scorer and method must handle; small, so that masks can be compared in full.
inline std::vector<CaseShape> all_shapes() {
  return {
      {.name = "square", .q_len = 300, .kv_len = 300},
      {.name = "one_token", .q_len = 1, .kv_len = 1},
      {.name = "below_a_tile", .q_len = 37, .kv_len = 37},
      {.name = "tile_minus_one", .q_len = 127, .kv_len = 127},
      {.name = "tile_plus_one", .q_len = 129, .kv_len = 129},
      {.name = "decode", .q_len = 1, .kv_len = 333},
      {.name = "chunk_aligned", .q_len = 128, .kv_len = 384},
      {.name = "chunk_unaligned", .q_len = 150, .kv_len = 411},
      {.name = "more_queries_than_keys", .q_len = 200, .kv_len = 90},
      {.name = "offset_beyond_keys", .q_len = 70, .kv_len = 100, .q_offset = 90},
      {.name = "negative_offset", .q_len = 70, .kv_len = 100, .q_offset = -20},
      {.name = "grouped_heads", .q_heads = 4, .kv_heads = 2, .q_len = 260, .kv_len = 260},
      {.name = "batch", .batch = 3, .q_len = 140, .kv_len = 200},
      {.name = "bidirectional", .q_len = 200, .kv_len = 300, .causal = false},
      {.name = "no_keys", .q_len = 5, .kv_len = 0},
      {.name = "variable_lengths", .q_lens = {130, 0, 1, 70}, .kv_lens = {260, 10, 40, 70}},
      {.name = "paged", .batch = 2, .q_len = 100, .kv_len = 250, .page_size = 16},
      {.name = "tokens_before_heads", .batch = 2, .q_len = 150, .kv_len = 150, .layout = Layout::bnhd},
      {.name = "bf16", .q_len = 200, .kv_len = 200, .dtype = DType::bf16},
      {.name = "f16", .q_len = 200, .kv_len = 200, .dtype = DType::f16},
  };
}

}  // namespace tessera::test
