// The backward pass of planned attention: gradients of everything run() reads, for a plan that stays as it is.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "tessera/attention.h"
#include "tessera/core.h"
#include "tessera/plan.h"

namespace tessera {

/// What the forward pass left behind, and the gradients that arrive.
///
/// When several calls of run() were merged by LSE, every part takes the merged output and the merged LSE: its gradients
/// are then exact parts of the whole.
struct SavedForward {
  TensorView o;                  ///< [B, Hq, Nq, Dv] output, f32, bf16 or f16
  std::span<const float> lse;    ///< natural log, laid out like AttentionOutputs::lse
  TensorView d_o;                ///< [B, Hq, Nq, Dv] gradient of the output, f32, bf16 or f16
  std::span<const float> d_lse;  ///< gradient of the LSE where it is used itself, like lse; empty: 0
};

/// Gradients of one derived key source; a view without data is not wanted.
struct SourceGradients {
  MutableTensorView d_k;          ///< [batch, kv_heads, keys, head_dim] in f32, bf16 or f16
  MutableTensorView d_v;          ///< [batch, kv_heads, keys, value_dim]
  std::span<float> d_log_weight;  ///< [batch, kv_heads, keys]; needs KeySource::log_weight
};

/// A gradient that a method writes for a side input of that name.
struct SideGradient {
  std::string name;
  MutableTensorView view;
};

/// Where the backward pass writes; a view without data is not wanted. Everything is overwritten, nothing added to.
struct Gradients {
  MutableTensorView d_q;                 ///< [B, Hq, Nq, D] in f32, bf16 or f16
  MutableTensorView d_k;                 ///< [B, Hkv, Nk, D], summed over the query heads of a group
  MutableTensorView d_v;                 ///< [B, Hkv, Nk, Dv]
  MutableTensorView d_key_bias;          ///< f32, the shape of Modifiers::key_bias
  std::span<float> d_sink_logits;        ///< [q_heads]
  std::span<float> d_weight_factors;     ///< of Modifiers::weight_factors, like lse; needs RowWeights::reweighted
  std::vector<SourceGradients> sources;  ///< empty, or sources[i] belongs to AttentionInputs::sources[i]
  std::vector<SideGradient> side;        ///< written by methods with side inputs, not by run_backward()

  /// The gradient wanted for the side tensor of that name, or null.
  const MutableTensorView* find_side(std::string_view name) const {
    for (const SideGradient& tensor : side) {
      if (tensor.name == name) return &tensor.view;
    }
    return nullptr;
  }
};

/// Gradients of run(plan, inputs) for the output gradient `saved.d_o`: with P = exp(score - LSE) and
/// delta = sum(dO * O) - dLSE per row, dV = P^T dO, dS = P (dO V^T - delta), dQ = scale dS K, dK = scale dS^T Q
/// (FlashAttention-2, arXiv 2307.08691). The plan is a constant. Rows without keys contribute nothing and get 0. Other
/// row weights f: P = f(score) / exp(LSE), dS = f'(score) / exp(LSE) (dO V^T - delta), where the factors of
/// RowWeights::reweighted are inputs with a gradient of their own. Query scales are constants.
///
/// Sums are float32 and do not depend on the number of threads. When q, k, v and d_o are bf16 and the machine
/// multiplies bf16 pairs, P and dS are rounded to bf16 for their products; otherwise everything is float32.
/// `options.kernel` is automatic, reference (float64), query_major or key_major.
/// Throws Error when the tensors do not fit the plan's problem, and for keys in pages.
RunReport run_backward(const Plan& plan, const AttentionInputs& inputs, const SavedForward& saved,
                       const Gradients& gradients, const RunOptions& options = {});

}  // namespace tessera
