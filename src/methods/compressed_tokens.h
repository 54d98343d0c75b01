// Overlapping blocks of keys and values as one token each, and the way back: the compressed branch of Native Sparse
// Attention (arXiv:2502.11089, section 3.3.1).
//
// Token t stands for keys [t * stride, t * stride + length). Keys are compressed before RoPE where the side input
// `k_compress` gives them so, and rotated to the first position of their block afterwards; else as they are. Weights
// come as side inputs, one set per kv head: see score/block_compression.h.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "score/block_compression.h"
#include "tessera/gradient.h"
#include "tessera/method.h"

namespace tessera {

/// A contiguous tensor in any attention dtype with its memory.
struct OwnedTensor {
  std::vector<std::byte> bytes;
  MutableTensorView view;

  OwnedTensor() = default;
  OwnedTensor(DType dtype, const std::array<std::int64_t, 4>& shape);
};

/// Keys and values of the compressed branch: [B, Hkv, most, *] in the dtype of k and v; sequence s has `counts[s]`.
struct CompressedTokens {
  std::int64_t most = 0;
  std::vector<std::int64_t> counts;
  OwnedTensor k;
  OwnedTensor v;
};

/// Compressed tokens of one sequence batch, per layer and (sequence, kv head); keys may only be appended to.
class CompressedTokenState final : public MethodState {
 public:
  struct Layer {
    std::vector<std::vector<float>> k;
    std::vector<std::vector<float>> v;
  };
  std::map<std::int64_t, Layer> layers;
};

struct TokenCompression {
  std::int64_t length;
  std::int64_t stride;
  score::CompressionKind kind;
  double rope_theta;

  /// Tokens of all keys; with a CompressedTokenState in the context only those that new keys complete are worked out.
  CompressedTokens forward(const Problem& problem, const AttentionInputs& inputs, const PlanContext& context) const;
  /// Gradients of one kv head's tokens ("k" or "v", float, turned back in place) to the rows they came from, and to the
  /// weights, under the names of their side inputs.
  void backward(const Problem& problem, const AttentionInputs& inputs, const Gradients& gradients,
                const CompressedTokens& tokens, const MutableTensorView& d_tokens, const std::string& of,
                std::int64_t kv_head, const MutableTensorView& d_rows) const;

 private:
  score::BlockCompression of_blocks(const AttentionInputs& inputs, const std::string& of, std::int64_t dim) const;
  void extend(const Problem& problem, const AttentionInputs& inputs, const score::BlockCompression& compression,
              const std::string& of, std::int64_t pair, const CompressedTokens& tokens, std::vector<float>& known,
              const OwnedTensor& to) const;
};

}  // namespace tessera
