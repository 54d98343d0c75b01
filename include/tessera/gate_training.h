// Learned tile gates (SeerAttention, arXiv:2410.13276): scores, and what training them needs.
//
// A gate predicts which key tiles a query tile will look at, from queries and keys before RoPE pooled over tiles. It is
// distilled from dense attention with all weights of the model frozen: gate_target() makes the ground truth in one pass
// of the kernel, gate_loss() the loss of a layer and its gradients. Optimiser and data are the caller's: AdamW with
// learning rate 1e-3, cosine schedule, no weight decay, and the losses of all layers added up and multiplied by 10, are
// the paper's.
#pragma once

#include <array>
#include <span>
#include <vector>

#include "tessera/attention.h"

namespace tessera {

/// Poolings of a tile along the sequence; a ragged last tile pools over the tokens it has.
enum class TilePooling : std::uint8_t { maximum, minimum, average };
inline constexpr std::size_t kTilePoolings = 3;

/// A gate as tensors, all f32, bf16 or f16. A projection is the sum over the poolings in use of pooled * weight; a view
/// without data leaves its pooling out. What checkpoints store as one matrix over concatenated poolings are the weights
/// of the poolings one below the other.
struct TileGate {
  TensorView q;  ///< [B, Hq, Nq, D] before RoPE
  TensorView k;  ///< [B, Hkv, Nk, D] before RoPE
  /// Per pooling [1, Hq, D, width]. With none, the queries are pooled by `query_pooling` and not projected: width is D
  /// then, and every query head has key weights of its own.
  std::array<TensorView, kTilePoolings> wq = {};
  /// Per pooling [1, Hkv, D, width], or [1, Hq, D, width] where there is no wq. At least one.
  std::array<TensorView, kTilePoolings> wk = {};
  TilePooling query_pooling = TilePooling::average;
  std::int64_t tile = 64;    ///< tokens per tile of queries and keys
  double rope_base = 10000;  ///< of the rotation at the position of a tile's first token; halves (i, i + width / 2)
};

/// G [query tiles][key tiles] of (sequence, query head): rotated query projection . key projection / sqrt(width), -inf
/// where no query of the tile may see a key of the other. Throws Error where the gate does not fit the problem.
std::vector<float> gate_scores(const Problem& problem, const TileGate& gate, std::int64_t sequence,
                               std::int64_t q_head);

/// target [B, Hq, query tiles, key tiles]: the largest dense probability in each pair of tiles, rows divided by their
/// sums; 0 for a row of tiles that sees no key. Uniform batches. `inputs` are those of the attention call, after RoPE.
void gate_target(const Problem& problem, const AttentionInputs& inputs, std::int64_t tile, std::span<float> target,
                 const RunOptions& options = {});

/// Gradients by the weights of a gate, in the shapes of the weights, contiguous; empty where the gate has no weight.
struct TileGateGradients {
  std::array<std::vector<float>, kTilePoolings> wq;
  std::array<std::vector<float>, kTilePoolings> wk;
};

/// KL(target || softmax(G)) of a uniform batch: its mean over all entries of the query tiles behind the first
/// `skipped` share of them. `gradients`, if not null, receives its derivatives.
double gate_loss(const Problem& problem, const TileGate& gate, std::span<const float> target,
                 TileGateGradients* gradients = nullptr, double skipped = 0.25, int threads = 0);

}  // namespace tessera
