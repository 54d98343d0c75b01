// The feed-forward part of a layer: one gated layer, or a mixture of experts.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "model/weights.h"
#include "tessera/model.h"

namespace tessera::model {

/// Experts of some rows, grouped: the rows of expert e are entries [first[e], first[e + 1]).
struct Routing {
  std::vector<std::int64_t> first;  ///< [experts + 1]
  std::vector<std::int32_t> rows;   ///< ascending within an expert
  std::vector<float> weights;       ///< of the entry in its row
};

/// Chooses the experts of every row by its scores [rows][experts] (softmax over all; the lower index among equals).
Routing route(std::span<const float> scores, const ExpertsConfig& config);

/// Holds the scratch of groups of rows.
class FeedForward {
 public:
  /// The configuration must outlive the object.
  explicit FeedForward(const ModelConfig& config) : config_(config) {}

  /// out [rows][hidden] = the layer's feed-forward part of x [rows][hidden].
  void run(const LayerWeights& layer, const float* x, std::int64_t rows, float* out, const ProductOptions& products);
  void release();

  /// Most floats that run() holds for a row.
  static std::int64_t floats_per_row(const ModelConfig& config);

 private:
  void run_one(const FeedForwardWeights& part, const float* x, std::int64_t rows, float* out,
               const ProductOptions& products);
  void run_experts(const LayerWeights& layer, const float* x, std::int64_t rows, float* out,
                   const ProductOptions& products);

  const ModelConfig& config_;
  std::vector<float> gate_;      ///< [rows][intermediate]
  std::vector<float> up_;        ///< [rows][intermediate]
  std::vector<float> scores_;    ///< [rows][experts]
  std::vector<float> gathered_;  ///< [rows of an expert][hidden]
  std::vector<float> result_;    ///< [rows of an expert][hidden]
};

}  // namespace tessera::model
