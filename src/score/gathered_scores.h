// Scores of single keys anywhere in a sequence against a few queries: what staged searches (score/refine.h) look at.
//
// HiP (arXiv 2406.09827) and InfiniteHiP (2502.08910) judge thousands of scattered representatives per query tile. Rows
// are read where they lie; packing them for a matrix product would cost more than the products.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/key_rows.h"
#include "tessera/attention.h"

namespace tessera::score {

/// The kernel text of one instruction set. Words are floats or pairs of bf16; queries are [panels][words][16].
struct GatheredLevel {
  using Largest = void (*)(const std::uint32_t* const* keys, std::int64_t count, const std::uint32_t* queries,
                           std::int64_t panels, std::int64_t words, float* out);
  Largest floats;
  Largest pairs;  ///< null: the machine multiplies no pairs of bf16
};

/// A few queries in the form that the products read. Pairs round them to bf16.
struct QueryPanels {
  std::vector<std::uint32_t> words;
  std::int64_t panels = 0;

  /// rows [count][dim], count >= 1.
  void pack(const float* rows, std::int64_t count, std::int64_t dim, bool pairs);
};

/// Keys [0, count) of one (sequence, kv head). Rows of bf16 are read in place where the queries are bf16 too and the
/// machine multiplies pairs, rows of floats always; others are converted once.
class GatheredKeys {
 public:
  GatheredKeys(const Problem& problem, const AttentionInputs& inputs, std::int64_t sequence, std::int64_t kv_head,
               std::int64_t count, const RunOptions& options);

  /// How queries must be packed.
  bool pairs() const { return pairs_; }
  /// out[i] = the largest q . k of key keys[i] over the queries, without scale; NaN where one of them is NaN.
  void largest(const QueryPanels& queries, std::span<const std::int32_t> keys, float* out) const;

 private:
  kernels::KeyRows rows_;
  std::vector<float> converted_;
  std::int64_t dim_ = 0;
  bool pairs_ = false;
  GatheredLevel::Largest product_ = nullptr;
};

}  // namespace tessera::score
