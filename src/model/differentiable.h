// A model as searches by gradient see it: hidden states of a sequence, and how they change with what its attention
// gives out. Weights are constants.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "tessera/attention.h"
#include "tessera/gradient.h"
#include "tessera/model.h"

namespace tessera::model {

/// How the layers attend in a pass, and the gradient of that.
class DifferentiableAttention {
 public:
  virtual ~DifferentiableAttention() = default;
  /// Writes the output of a layer, f32 [1, q_heads, N, head_dim].
  virtual void forward(std::int64_t layer, const Problem& problem, const AttentionInputs& inputs,
                       const MutableTensorView& o) = 0;
  /// From the gradient of that output those of q, k and v; `wanted` says which, as in run_backward(). `inputs` are
  /// those of the forward pass again. Layers come last to first.
  virtual void backward(std::int64_t layer, const Problem& problem, const AttentionInputs& inputs,
                        const TensorView& d_o, const Gradients& wanted) = 0;
};

class DifferentiableModel {
 public:
  virtual ~DifferentiableModel() = default;
  virtual std::int64_t layers() const = 0;
  virtual std::int64_t kv_heads() const = 0;
  /// Last hidden states [tokens][width], after the final norm; valid until the next forward().
  virtual std::span<const float> forward(std::span<const std::int32_t> tokens, DifferentiableAttention& attention) = 0;
  /// Takes the gradient of what the last forward() returned back through the layers.
  virtual void backward(std::span<const float> d_hidden, DifferentiableAttention& attention) = 0;
};

/// A decoder with input gradients. Keeps the input and the attention output of every layer of a pass; the rest is
/// computed again on the way back.
class DifferentiableDecoder final : public DifferentiableModel {
 public:
  /// The model must outlive it.
  explicit DifferentiableDecoder(const Model& model, int threads = 0);
  ~DifferentiableDecoder() override;

  std::int64_t layers() const override;
  std::int64_t kv_heads() const override;
  /// Throws Error for no tokens and ids outside the vocabulary.
  std::span<const float> forward(std::span<const std::int32_t> tokens, DifferentiableAttention& attention) override;
  void backward(std::span<const float> d_hidden, DifferentiableAttention& attention) override;

  /// Mean over the tokens [first, end) of the last pass of -log p(token | those before it); first is 1 or more. Its
  /// gradient is added to d_hidden [tokens][hidden] unless that is empty.
  double cross_entropy(std::int64_t first, std::int64_t end, std::span<float> d_hidden);

 private:
  class Implementation;
  std::unique_ptr<Implementation> implementation_;
};

}  // namespace tessera::model
