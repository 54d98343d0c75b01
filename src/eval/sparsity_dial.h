// How concentrated softmax rows are, and the factor on the queries that makes them as concentrated as wanted.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace tessera::eval {

/// Keys that a row needs for `mass` of its softmax at logits `temperature` * logits. `sorted` is descending.
std::int64_t top_p_count(std::span<const float> sorted, double temperature, double mass);

/// Mean over rows of top_p_count(0.95) / keys. Every row descending.
double top_p_density(std::span<const std::vector<float>> rows, double temperature);

/// Temperature at which the density of these rows is `target`, by bisection on a log scale within [1/64, 64]; the
/// nearer end when the target is out of reach. The density falls as the temperature grows.
double temperature_for_density(std::span<const std::vector<float>> rows, double target);

}  // namespace tessera::eval
