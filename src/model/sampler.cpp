#include "model/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/error.h"

namespace tessera::model {

namespace {

/// Place of the largest number, the first among equals; NaN never wins.
std::size_t largest(std::span<const float> logits) {
  // First how large, then where: both loops go many numbers at a time.
  float most = -std::numeric_limits<float>::infinity();
  const float* numbers = logits.data();
  const std::size_t count = logits.size();
#pragma omp simd reduction(max : most)
  for (std::size_t i = 0; i < count; ++i) most = numbers[i] > most ? numbers[i] : most;
  const auto best = static_cast<std::size_t>(std::find(logits.begin(), logits.end(), most) - logits.begin());
  require(best < logits.size() && std::isfinite(logits[best]),
          "the model's logits are not finite; expected numbers (are the weights damaged?)");
  return best;
}

}  // namespace

Sampler::Sampler(const SamplingOptions& options) : options_(options), generator_(options.seed) {
  require(std::isfinite(options.temperature) && options.temperature >= 0,
          "temperature is {}; expected 0 (greedy) or a positive number", options.temperature);
  require(options.top_p > 0 && options.top_p <= 1, "top_p is {}; expected a number above 0, at most 1", options.top_p);
}

std::int32_t Sampler::next(std::span<const float> logits) {
  const std::size_t best = largest(logits);
  if (options_.temperature == 0) return static_cast<std::int32_t>(best);

  weights_.resize(logits.size());
  order_.clear();
  double total = 0;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    const double distance = static_cast<double>(logits[i]) - static_cast<double>(logits[best]);
    weights_[i] = std::isnan(logits[i]) ? 0 : std::exp(distance / options_.temperature);
    total += weights_[i];
    if (weights_[i] > 0) order_.push_back(static_cast<std::int32_t>(i));
  }
  if (options_.top_p < 1) {
    std::sort(order_.begin(), order_.end(), [&](std::int32_t a, std::int32_t b) {
      return weights_[a] != weights_[b] ? weights_[a] > weights_[b] : a < b;
    });
    double kept = 0;
    std::size_t count = 0;
    while (count < order_.size() && (count == 0 || kept < options_.top_p * total)) kept += weights_[order_[count++]];
    order_.resize(count);
    total = kept;
  }
  const double uniform = static_cast<double>(generator_() >> 11) * 0x1p-53;
  double below = 0;
  for (const std::int32_t token : order_) {
    below += weights_[token];
    if (uniform * total < below) return token;
  }
  return order_.back();  // rounding of the running sum
}

}  // namespace tessera::model
