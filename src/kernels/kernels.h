// The contract of all kernels: they run a checked plan on checked tensors and check nothing themselves.
#pragma once

#include "tessera/attention.h"

namespace tessera::kernels {

/// One attention call as every kernel receives it.
struct Call {
  const Plan& plan;
  const AttentionInputs& inputs;
  const AttentionOutputs& outputs;
  int threads;
  std::size_t workspace_bytes;
  Workspace* workspace = nullptr;
  OnlineSkip online_skip = {};

  /// Whether somebody needs the true maximum of every row, which the softmax itself does not keep.
  bool follows_maxima() const {
    return !outputs.row_maximum.empty() || outputs.tile_maximum.data != nullptr || online_skip.used();
  }
  const Problem& problem() const { return plan.problem; }
  /// Offset of (sequence, head, query) in outputs.lse: [B, Hq, Nq], or [Hq, total queries] in variable-length batches.
  std::int64_t lse_index(std::int64_t sequence, std::int64_t q_head, std::int64_t query) const {
    return (problem().tensor_batch_of(sequence) * problem().q_heads + q_head) * problem().q_len +
           problem().q_begin_of(sequence) + query;
  }
  /// Row of q or o.
  template <class View>
  auto* query_row(const View& view, std::int64_t sequence, std::int64_t q_head, std::int64_t query) const {
    return view.row(problem().tensor_batch_of(sequence), q_head, problem().q_begin_of(sequence) + query);
  }
  /// Bias added to the score of (sequence, kv head of q_head, q_head, key); null tensor: 0.
  float key_bias(std::int64_t sequence, std::int64_t q_head, std::int64_t key) const {
    const TensorView& bias = inputs.modifiers.key_bias;
    if (bias.data == nullptr) return 0;
    const std::int64_t head = q_head * bias.heads() / problem().q_heads;
    const std::int64_t batch = bias.batch() == 1 ? 0 : sequence;
    return *reinterpret_cast<const float*>(bias.row(batch, head, problem().kv_begin_of(sequence) + key));
  }
};

/// Throws Error unless the derived key sources fit the plan.
void check_key_sources(const Plan& plan, const AttentionInputs& inputs);

/// Naive float64 evaluation of everything a plan can say: the oracle of every test. Returns the pairs that the online
/// skip left out.
std::int64_t run_reference(const Call& call);

/// Sets output 0 and LSE -inf on rows that no query tile covers (query subsets).
void clear_uncovered_rows(const Call& call);

}  // namespace tessera::kernels
