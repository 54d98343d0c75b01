#include "eval/sparsity_dial.h"

#include <cmath>

namespace tessera::eval {

std::int64_t top_p_count(std::span<const float> sorted, double temperature, double mass) {
  double total = 0;
  for (const float logit : sorted) total += std::exp(temperature * (logit - sorted.front()));
  double sum = 0;
  std::int64_t count = 0;
  for (const float logit : sorted) {
    sum += std::exp(temperature * (logit - sorted.front()));
    ++count;
    if (sum >= mass * total) break;
  }
  return count;
}

double top_p_density(std::span<const std::vector<float>> rows, double temperature) {
  double sum = 0;
  for (const std::vector<float>& row : rows) {
    sum += static_cast<double>(top_p_count(row, temperature, 0.95)) / static_cast<double>(row.size());
  }
  return sum / static_cast<double>(rows.size());
}

double temperature_for_density(std::span<const std::vector<float>> rows, double target) {
  double low = std::log(1.0 / 64);
  double high = std::log(64.0);
  for (int step = 0; step < 24; ++step) {
    const double middle = (low + high) / 2;
    (top_p_density(rows, std::exp(middle)) > target ? low : high) = middle;
  }
  return std::exp((low + high) / 2);
}

}  // namespace tessera::eval
