#include "model/rope.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <numbers>

namespace tessera::model {

namespace {

/// theta^(-2i / dims) for every pair.
std::vector<double> plain(double theta, std::int64_t dims) {
  std::vector<double> result;
  for (std::int64_t i = 0; i < dims; i += 2) {
    result.push_back(std::pow(theta, -static_cast<double>(i) / static_cast<double>(dims)));
  }
  return result;
}

/// Frequencies that turn often within the original context are kept, those that turn seldom are divided by the factor,
/// with a linear ramp over the dimensions between.
void scale_yarn(const RopeConfig& config, std::int64_t dims, std::vector<double>& frequencies) {
  const auto width = static_cast<double>(dims);
  const auto dimension_of = [&](double rotations) {
    const double wave = static_cast<double>(config.original_positions) / (rotations * 2 * std::numbers::pi);
    return width * std::log(wave) / (2 * std::log(config.theta));
  };
  double low = dimension_of(config.beta_fast);
  double high = dimension_of(config.beta_slow);
  if (config.whole_dims) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, width - 1);
  if (low == high) high += 0.001;
  for (std::size_t i = 0; i < frequencies.size(); ++i) {
    const double divided = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
    frequencies[i] *= divided / config.factor + (1 - divided);
  }
}

void scale_llama3(const RopeConfig& config, std::vector<double>& frequencies) {
  const auto context = static_cast<double>(config.original_positions);
  const double low = config.low_frequency_factor;
  const double high = config.high_frequency_factor;
  for (double& frequency : frequencies) {
    const double waves = context * frequency / (2 * std::numbers::pi);  // that fit into the original context
    const double kept = std::clamp((waves - low) / (high - low), 0.0, 1.0);
    frequency *= (1 - kept) / config.factor + kept;
  }
}

}  // namespace

Rope::Rope(const RopeConfig& config, std::int64_t head_dim)
    : config_(config), head_dim_(head_dim), dims_(config.dims == 0 ? head_dim : config.dims) {
  assert(dims_ > 0 && dims_ % 2 == 0 && dims_ <= head_dim);
}

std::vector<double> Rope::frequencies(std::int64_t length) const {
  const bool beyond = length > config_.original_positions;
  double theta = config_.theta;
  if (config_.scaling == RopeScaling::dynamic && beyond) {
    const double ratio = static_cast<double>(length) / static_cast<double>(config_.original_positions);
    const auto width = static_cast<double>(dims_);
    theta *= std::pow(config_.factor * ratio - (config_.factor - 1), width / (width - 2));
  }
  std::vector<double> result = plain(theta, dims_);
  switch (config_.scaling) {
    case RopeScaling::linear:
      for (double& frequency : result) frequency /= config_.factor;
      break;
    case RopeScaling::yarn:
      scale_yarn(config_, dims_, result);
      break;
    case RopeScaling::llama3:
      scale_llama3(config_, result);
      break;
    case RopeScaling::longrope: {
      const std::vector<double>& factors = beyond ? config_.long_factors : config_.short_factors;
      for (std::size_t i = 0; i < result.size(); ++i) result[i] /= factors[i];
      break;
    }
    default:
      break;
  }
  return result;
}

void Rope::tables(std::int64_t first, std::int64_t count, std::int64_t length, std::vector<float>& out) const {
  const std::vector<double> turns = frequencies(length);
  const std::int64_t half = dims_ / 2;
  out.resize(static_cast<std::size_t>(count * dims_));
  for (std::int64_t token = 0; token < count; ++token) {
    float* cosines = out.data() + token * dims_;
    for (std::int64_t i = 0; i < half; ++i) {
      const double angle = static_cast<double>(first + token) * turns[static_cast<std::size_t>(i)];
      cosines[i] = static_cast<float>(config_.attention_factor * std::cos(angle));
      cosines[half + i] = static_cast<float>(config_.attention_factor * std::sin(angle));
    }
  }
}

template <bool back>
void Rope::turn(float* rows, std::int64_t heads, const float* table) const {
  const std::int64_t half = dims_ / 2;
  const std::int64_t step = config_.interleaved ? 2 : 1;
  const std::int64_t apart = config_.interleaved ? 1 : half;
  const float* sines = table + half;
  for (std::int64_t head = 0; head < heads; ++head) {
    float* low = rows + head * head_dim_;
    float* high = low + apart;
#pragma omp simd
    for (std::int64_t i = 0; i < half; ++i) {
      const float x = low[i * step];
      const float y = high[i * step];
      const float sine = back ? -sines[i] : sines[i];
      low[i * step] = x * table[i] - y * sine;
      high[i * step] = y * table[i] + x * sine;
    }
  }
}

void Rope::rotate(float* rows, std::int64_t heads, const float* table) const {
  turn<false>(rows, heads, table);
}

void Rope::rotate_back(float* rows, std::int64_t heads, const float* table) const {
  turn<true>(rows, heads, table);
}

}  // namespace tessera::model
