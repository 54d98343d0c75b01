#include "model/rope.h"

#include <cassert>
#include <cmath>

namespace tessera::model {

Rope::Rope(std::int64_t head_dim, double theta) {
  assert(head_dim > 0 && head_dim % 2 == 0);
  for (std::int64_t i = 0; i < head_dim; i += 2) {
    frequencies_.push_back(std::pow(theta, -static_cast<double>(i) / static_cast<double>(head_dim)));
  }
}

void Rope::tables(std::int64_t first, std::int64_t count, std::vector<float>& out) const {
  const auto half = static_cast<std::int64_t>(frequencies_.size());
  out.resize(static_cast<std::size_t>(count * 2 * half));
  for (std::int64_t token = 0; token < count; ++token) {
    float* cosines = out.data() + token * 2 * half;
    for (std::int64_t i = 0; i < half; ++i) {
      const double angle = static_cast<double>(first + token) * frequencies_[static_cast<std::size_t>(i)];
      cosines[i] = static_cast<float>(std::cos(angle));
      cosines[half + i] = static_cast<float>(std::sin(angle));
    }
  }
}

void Rope::rotate(float* rows, std::int64_t heads, const float* table) const {
  const auto half = static_cast<std::int64_t>(frequencies_.size());
  const float* sines = table + half;
  for (std::int64_t head = 0; head < heads; ++head) {
    float* low = rows + head * 2 * half;
    float* high = low + half;
#pragma omp simd
    for (std::int64_t i = 0; i < half; ++i) {
      const float x = low[i];
      const float y = high[i];
      low[i] = x * table[i] - y * sines[i];
      high[i] = y * table[i] + x * sines[i];
    }
  }
}

void Rope::rotate_back(float* rows, std::int64_t heads, const float* table) const {
  const auto half = static_cast<std::int64_t>(frequencies_.size());
  const float* sines = table + half;
  for (std::int64_t head = 0; head < heads; ++head) {
    float* low = rows + head * 2 * half;
    float* high = low + half;
#pragma omp simd
    for (std::int64_t i = 0; i < half; ++i) {
      const float x = low[i];
      const float y = high[i];
      low[i] = x * table[i] + y * sines[i];
      high[i] = y * table[i] - x * sines[i];
    }
  }
}

}  // namespace tessera::model
