// The weights of a decoder.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "model/matrix.h"
#include "tessera/model.h"

namespace tessera::model {

/// down(f(gate(x)) * up(x)); biases are empty where there are none.
struct FeedForwardWeights {
  std::unique_ptr<Matrix> gate, up;  ///< [intermediate][hidden]
  std::unique_ptr<Matrix> down;      ///< [hidden][intermediate]
  std::vector<float> gate_bias, up_bias, down_bias;
};

struct LayerWeights {
  std::vector<float> attention_norm;  ///< [hidden]
  std::unique_ptr<Matrix> q, k, v;    ///< [heads * head_dim][hidden]
  std::unique_ptr<Matrix> o;          ///< [hidden][q_heads * head_dim]
  std::vector<float> q_bias, k_bias, v_bias, o_bias;
  std::vector<float> q_norm, k_norm;       ///< [head_dim]
  std::vector<float> attention_post_norm;  ///< [hidden]
  std::vector<float> mlp_norm;             ///< [hidden]
  std::vector<float> mlp_post_norm;        ///< [hidden]
  FeedForwardWeights mlp;                  ///< of layers without experts
  std::unique_ptr<Matrix> router;          ///< [experts][hidden]
  std::vector<FeedForwardWeights> experts;
};

struct Weights {
  std::unique_ptr<TensorSource> source;  ///< what the matrices refer to
  std::unique_ptr<Matrix> embedding;     ///< [vocab][hidden]
  std::vector<LayerWeights> layers;
  std::vector<float> norm;       ///< [hidden]
  std::unique_ptr<Matrix> head;  ///< [vocab][hidden]; null when tied
  const Matrix& output_head() const { return head ? *head : *embedding; }
  std::size_t heap_bytes() const;  ///< copied files too
  /// Bytes of the matrices that one token reads whose layers choose so many experts.
  double decoded_bytes(std::int64_t chosen_experts) const;
};

/// Takes what the configuration describes from the source. Throws Error for missing and unexpected tensors, and for
/// wrong shapes and types. Norms that multiply by 1 + weight become weights.
Weights load_weights(std::unique_ptr<TensorSource> source, const ModelConfig& config);

}  // namespace tessera::model
