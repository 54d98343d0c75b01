// A two-layer attention model with constructed weights that does associative recall: an end-to-end quality test of
// plans and kernels that needs no training and no download.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "tessera/attention.h"
#include "tessera/method.h"

namespace tessera::eval {

struct InductionOptions {
  std::int64_t vocabulary = 8192;
  std::int64_t dim = 64;  ///< of the embeddings, and twice the number of position pairs; even
  double previous_inverse_temperature = 60;
  double induction_inverse_temperature = 40;
  std::uint64_t seed = 0;
};

/// How a layer attends: fills outputs.o (and outputs.lse) from the inputs.
using Attend = std::function<void(const Problem&, const AttentionInputs&, const AttentionOutputs&)>;

/// Runs the plan that `make_plan` returns.
Attend attend_by_plan(std::function<Plan(const Problem&, const AttentionInputs&)> make_plan, RunOptions options = {});
/// Runs a method; it must outlive the result. `layer` of 2.
Attend attend_by_method(const Method& method, std::int64_t layer, RunOptions options = {});

/// Q, K, V of one layer, f32 [1, 1, N, dim] each, causal.
struct LayerTensors {
  Problem problem;
  std::vector<float> q, k, v;
  std::vector<float> sink_logits;  ///< [1], or empty
  /// Views of this object.
  AttentionInputs inputs() const;
};

/// Token embeddings E are random unit vectors, positions are cos / sin pairs of random frequencies.
/// Layer 1, previous-token head: the query of token i is position i - 1, keys are positions, values E. Its output B_i
/// is the embedding of token i - 1. Layer 2, induction head: the query is E of token i, keys are B, values E: it finds
/// the token that followed the last occurrence of token i. Logits are E times the output.
class InductionModel {
 public:
  explicit InductionModel(const InductionOptions& options = {});

  LayerTensors previous_token_layer(std::span<const std::int32_t> tokens) const;
  /// `previous` [N, dim] is the output of layer 1.
  LayerTensors induction_layer(std::span<const std::int32_t> tokens, std::span<const float> previous) const;
  /// Most likely next token at each of `positions`. Throws Error for tokens or positions out of range.
  std::vector<std::int32_t> predict(std::span<const std::int32_t> tokens, std::span<const std::int64_t> positions,
                                    const Attend& layer1, const Attend& layer2) const;

 private:
  std::vector<float> embed(std::span<const std::int32_t> tokens) const;
  std::vector<float> positions(std::int64_t count, std::int64_t shift) const;
  std::int32_t most_likely(std::span<const float> output) const;

  InductionOptions options_;
  std::vector<float> embeddings_;    ///< [vocabulary, dim]
  std::vector<double> frequencies_;  ///< [dim / 2]
};

}  // namespace tessera::eval
