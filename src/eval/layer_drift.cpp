#include "eval/layer_drift.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"

namespace tessera::eval {

double layer_drift(std::span<const float> in, std::span<const float> out, std::int64_t width) {
  require(width > 0 && in.size() == out.size() && !in.empty() && in.size() % static_cast<std::size_t>(width) == 0,
          "hidden states have {} and {} numbers; expected the same whole number of rows of {}", in.size(), out.size(),
          width);
  const std::size_t tokens = in.size() / static_cast<std::size_t>(width);
  double sum = 0;
  for (std::size_t t = 0; t < tokens; ++t) {
    double before = 0;
    double change = 0;
    for (std::size_t i = t * static_cast<std::size_t>(width); i < (t + 1) * static_cast<std::size_t>(width); ++i) {
      before += static_cast<double>(in[i]) * in[i];
      change += (static_cast<double>(out[i]) - in[i]) * (static_cast<double>(out[i]) - in[i]);
    }
    if (before > 0) {
      sum += std::sqrt(change / before);
    } else {
      sum += change > 0 ? 1 : 0;
    }
  }
  return sum / static_cast<double>(tokens);
}

std::vector<std::int64_t> stable_layers(std::span<const double> drift, double quantile) {
  require(quantile >= 0 && quantile <= 1, "quantile is {}; expected 0 to 1", quantile);
  for (const double x : drift) require(std::isfinite(x) && x >= 0, "a drift is {}; expected 0 or more", x);
  std::vector<double> sorted(drift.begin(), drift.end());
  std::sort(sorted.begin(), sorted.end());
  const auto count = static_cast<std::size_t>(std::ceil(quantile * static_cast<double>(sorted.size())));
  std::vector<std::int64_t> layers;
  if (count == 0) return layers;
  // The published measure divides by the sum over layers first, which changes no order.
  for (std::size_t i = 0; i < drift.size(); ++i) {
    if (drift[i] <= sorted[count - 1]) layers.push_back(static_cast<std::int64_t>(i));
  }
  return layers;
}

std::string layer_list_text(std::span<const std::int64_t> layers) {
  std::string text;
  for (std::size_t i = 0; i < layers.size();) {
    std::size_t end = i + 1;
    while (end < layers.size() && layers[end] == layers[end - 1] + 1) ++end;
    if (!text.empty()) text += '+';
    text += end - i > 1 ? fmt::format("{}-{}", layers[i], layers[end - 1]) : fmt::format("{}", layers[i]);
    i = end;
  }
  return text;
}

}  // namespace tessera::eval
