// Parts of scheduling that the three kernels share.
#pragma once

#include <cmath>
#include <new>
#include <type_traits>

#include "kernels/cpu/tile.h"
#include "kernels/workspace.h"

namespace tessera::kernels {

/// Pairs of bf16 are multiplied directly when the machine can and all inputs are bf16.
inline TileShape shape_of_call(const Call& call, const LevelKernels& level) {
  const bool pairs = level.pairs_bf16 && call.inputs.q.dtype == DType::bf16 && call.inputs.k.dtype == DType::bf16;
  return tile_shape_of(call.problem(), call.inputs.k.dtype, pairs);
}

/// Where the scale goes. Float products take it into the query, and log2(e) with it where nothing looks at a score
/// before its exponential. Pair products keep bf16 queries exact and take only the sign there, since the row maximum is
/// found on raw products and needs a positive factor after it. Modified scores become exponents of 2 as they are made.
inline ScoreRule score_rule_of(const Call& call, const TileShape& shape) {
  constexpr float log2e = 1.4426950409F;
  bool derived_weights = false;
  for (const KeySource& source : call.inputs.sources) derived_weights = derived_weights || !source.log_weight.empty();
  const float scale = call.problem().softmax_scale();
  ScoreRule rule{};
  rule.modified = call.inputs.modifiers.changes_scores() || derived_weights;
  rule.weights = call.inputs.modifiers.weights;
  const bool into_query = !shape.pair_product || scale == 0;
  rule.query_factor = into_query ? (rule.modified ? scale : scale * log2e) : std::copysign(1.0F, scale);
  rule.to_natural = into_query ? 1.0F : std::fabs(scale);
  rule.from_natural = rule.weights == RowWeights::softmax ? log2e : 1.0F;
  rule.to_log2 = rule.modified || into_query ? 1.0F : std::fabs(scale) * log2e;
  return rule;
}

/// One scratch per thread. Hardly more than its pointers is written here: what a thread has in its caches from the call
/// before stays there, which a step of decoding would otherwise spend longer on than on attention.
class ThreadScratch {
 public:
  ThreadScratch(const Call& call, const TileShape& shape, bool with_queries)
      : bytes_each_(own_bytes + scratch_bytes(shape, with_queries)),
        threads_(static_cast<std::size_t>(call.threads)),
        memory_(call.workspace, bytes_each_ * threads_) {
    for (std::size_t t = 0; t < threads_; ++t) {
      std::byte* piece = memory_.data() + t * bytes_each_;
      place_scratch(shape, with_queries, piece + own_bytes, *::new (piece) TileScratch);
    }
  }
  TileScratch& of(int thread) {
    return *std::launder(
        reinterpret_cast<TileScratch*>(memory_.data() + static_cast<std::size_t>(thread) * bytes_each_));
  }
  std::size_t bytes() const { return threads_ * bytes_each_; }

 private:
  static constexpr std::size_t own_bytes = (sizeof(TileScratch) + 63) / 64 * 64;
  static_assert(std::is_trivially_destructible_v<TileScratch>);

  std::size_t bytes_each_;
  std::size_t threads_;
  BorrowedBuffer memory_;
};

/// Query heads that share a plan row and a kv head.
inline std::int64_t heads_per_row(const Plan& plan) {
  return plan.plan_heads == plan.problem.q_heads ? 1 : plan.problem.group();
}

}  // namespace tessera::kernels
