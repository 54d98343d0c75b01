// The forward pass of a decoder: embedding, layers of attention and gated feed-forward parts or experts, head. One for
// all architectures; ModelConfig says what a layer has.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "model/layers/feed_forward.h"
#include "model/rope.h"
#include "model/weights.h"
#include "tessera/cache.h"
#include "tessera/method.h"
#include "tessera/model.h"

namespace tessera::model {

/// How one pass attends.
struct AttentionCall {
  const Method* method = nullptr;
  MethodState* state = nullptr;
  RunOptions run;
  bool prompt = false;         ///< the tokens belong to the prompt
  bool prompt_ends = false;    ///< with these tokens: caches may compress
  bool exact = false;          ///< see SessionOptions::exact_products
  bool round_queries = false;  ///< to bf16 where pairs can be multiplied: the keys are bf16
  std::int64_t length = 0;     ///< tokens of the sequence once the prompt is in: what some rotary scalings depend on
  /// Receives the plan of each layer if set.
  std::function<void(std::int64_t layer, const Plan& plan)> on_plan;
  /// Receives the queries, keys and values of the pass if set.
  std::function<void(const ProjectedRows& rows)> on_projections;
  /// Called after each layer; may throw to end the pass.
  std::function<void(std::int64_t layers_done)> after_layer;
};

/// Passes over one model. Holds the activations of a pass, to be used again by the next.
class Decoder {
 public:
  /// Both must outlive the decoder.
  Decoder(const ModelConfig& config, const Weights& weights);

  /// Appends the tokens to the caches of the layers and returns their last hidden states [tokens][hidden] before the
  /// final norm, valid until the next pass. Ids must lie in the vocabulary and the tokens fit the caches. On an
  /// exception some caches hold the new tokens already. Adds the time of plans and kernels to attention_ms.
  std::span<const float> forward(std::span<const std::int32_t> tokens,
                                 std::span<const std::unique_ptr<LayerCache>> caches, const AttentionCall& call,
                                 double& attention_ms);
  /// Final norm and head: logits [rows][vocab] of hidden states [rows][hidden].
  void head(std::span<const float> hidden, std::vector<float>& logits, const RunOptions& run, bool exact);

  /// Activations of a pass over one token, in bytes: what the default chunk length is judged by.
  static std::int64_t bytes_per_token(const ModelConfig& config);
  /// What a pass needs beside that, however long.
  static std::int64_t scratch_bytes(const ModelConfig& config);
  /// Gives the activations' memory back.
  void release();

 private:
  void project_inputs(std::int64_t layer_index, LayerCache& cache, const AttentionCall& call);
  void attend(std::int64_t layer_index, LayerCache& cache, const AttentionCall& call, double& attention_ms);
  void finish_layer(std::int64_t layer_index, const ProductOptions& options);
  ProductOptions products(const RunOptions& run, bool exact) {
    return {.threads = run.threads, .exact = exact, .isa = run.isa, .scratch = &scratch_};
  }
  /// The queries as attention reads them.
  TensorView attending_queries(const AttentionCall& call);
  void rotate(const Rope& rope, std::int64_t position, std::int64_t rows, const AttentionCall& call, float* queries);

  const ModelConfig& config_;
  const Weights& weights_;
  Rope rope_;
  Rope local_rope_;
  FeedForward feed_forward_;
  ProductScratch scratch_;
  std::int64_t rows_ = 0;  ///< tokens of the pass
  // Of the whole pass.
  std::vector<float> hidden_;    ///< [rows][hidden]
  std::vector<float> queries_;   ///< [rows][q_heads * head_dim]
  std::vector<float> attended_;  ///< [rows][q_heads * head_dim]
  // Of a group of rows.
  std::vector<float> normed_;     ///< [group][hidden]
  std::vector<float> projected_;  ///< [group][hidden]: what joins the residual stream
  std::vector<float> keys_;       ///< [group][kv_heads * head_dim]
  std::vector<float> values_;     ///< [group][kv_heads * head_dim]

  /// The rotations of a group of rows, the same in every layer.
  struct Rotations {
    std::int64_t position = 0;
    std::int64_t rows = 0;
    std::int64_t length = 0;
    std::vector<float> tables;  ///< [group][rotated dimensions]
  };
  Rotations rotations_;
  Rotations local_rotations_;
};

}  // namespace tessera::model
