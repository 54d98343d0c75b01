// Confidence intervals of means.
#pragma once

#include <cstdint>
#include <span>

namespace tessera::eval {

struct Estimate {
  double mean = 0;
  double low = 0;  ///< 95 % confidence interval
  double high = 0;
};

/// Mean of the values with its percentile bootstrap interval: 10,000 resamples from a fixed seed. One value has no
/// spread to learn from: its interval is [0, 1] widened to hold it. Throws Error for no values.
Estimate bootstrap_mean(std::span<const double> values);

}  // namespace tessera::eval
