// Choosing the next token from logits.
#pragma once

#include <cstdint>
#include <random>
#include <span>
#include <vector>

#include "tessera/model.h"

namespace tessera::model {

/// Greedy at temperature 0, else nucleus sampling (arXiv:1904.09751): softmax of logits / temperature, the fewest most
/// likely tokens that together hold top_p, one of them in proportion.
///
/// Draws one number of std::mt19937_64 per token, and turns it into [0, 1) by its upper 53 bits: the standard fixes the
/// generator, not its distributions.
class Sampler {
 public:
  /// Throws Error for a temperature that is negative or not finite and a top_p outside (0, 1].
  explicit Sampler(const SamplingOptions& options);
  /// Throws Error when no logit is a number.
  std::int32_t next(std::span<const float> logits);

 private:
  SamplingOptions options_;
  std::mt19937_64 generator_;
  std::vector<double> weights_;
  std::vector<std::int32_t> order_;
};

}  // namespace tessera::model
