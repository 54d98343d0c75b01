#include "eval/bootstrap.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "core/error.h"
#include "eval/random.h"

namespace tessera::eval {

Estimate bootstrap_mean(std::span<const double> values) {
  require(!values.empty(), "the mean of no values; expected one or more");
  const auto count = static_cast<std::int64_t>(values.size());
  Estimate estimate;
  estimate.mean = std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(count);
  if (count == 1) {
    estimate.low = std::min(0.0, estimate.mean);
    estimate.high = std::max(1.0, estimate.mean);
    return estimate;
  }
  constexpr std::size_t resamples = 10'000;
  std::vector<double> means(resamples);
  Random random(20240607, {count});
  for (double& mean : means) {
    double sum = 0;
    for (std::int64_t i = 0; i < count; ++i) sum += values[static_cast<std::size_t>(random.below(count))];
    mean = sum / static_cast<double>(count);
  }
  std::sort(means.begin(), means.end());
  estimate.low = means[resamples / 40];
  estimate.high = means[resamples - 1 - resamples / 40];
  return estimate;
}

}  // namespace tessera::eval
