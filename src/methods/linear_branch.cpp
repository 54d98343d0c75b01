#include "methods/linear_branch.h"

#include <algorithm>
#include <cmath>

namespace tessera {

void apply_feature_map(FeatureMap map, std::int64_t rows, std::int64_t dim, float* x) {
  for (std::int64_t r = 0; r < rows; ++r, x += dim) {
    if (map == FeatureMap::softmax) {
      const float highest = *std::max_element(x, x + dim);
      float sum = 0;
      for (std::int64_t d = 0; d < dim; ++d) sum += x[d] = std::exp(x[d] - highest);
      for (std::int64_t d = 0; d < dim; ++d) x[d] /= sum;
    } else if (map == FeatureMap::elu) {
      for (std::int64_t d = 0; d < dim; ++d) x[d] = x[d] > 0 ? x[d] + 1 : std::exp(x[d]);
    } else {
      for (std::int64_t d = 0; d < dim; ++d) x[d] = std::max(x[d], 0.0F);
    }
  }
}

void feature_map_backward(FeatureMap map, std::int64_t rows, std::int64_t dim, const float* x, const float* y,
                          float* d_y) {
  for (std::int64_t r = 0; r < rows; ++r, x += dim, y += dim, d_y += dim) {
    if (map == FeatureMap::softmax) {
      float dot = 0;
      for (std::int64_t d = 0; d < dim; ++d) dot += y[d] * d_y[d];
      for (std::int64_t d = 0; d < dim; ++d) d_y[d] = y[d] * (d_y[d] - dot);
    } else if (map == FeatureMap::elu) {
      for (std::int64_t d = 0; d < dim; ++d) d_y[d] *= x[d] > 0 ? 1.0F : y[d];
    } else {
      for (std::int64_t d = 0; d < dim; ++d) d_y[d] = x[d] > 0 ? d_y[d] : 0.0F;
    }
  }
}

TileStates::TileStates(std::int64_t tiles, std::int64_t head_dim, std::int64_t value_dim)
    : tiles_(tiles),
      head_dim_(head_dim),
      value_dim_(value_dim),
      matrices_(static_cast<std::size_t>(tiles * head_dim * value_dim), 0.0F),
      vectors_(static_cast<std::size_t>(tiles * head_dim), 0.0F),
      total_(static_cast<std::size_t>((value_dim + 1) * head_dim), 0.0) {}

void TileStates::add_up() {
  const std::int64_t elements = value_dim_ * head_dim_;
  std::fill(total_.begin(), total_.end(), 0.0);
  for (std::int64_t tile = 0; tile < tiles_; ++tile) {
    const float* m = matrix(tile);
    const float* v = vector(tile);
    for (std::int64_t i = 0; i < elements; ++i) total_[static_cast<std::size_t>(i)] += m[i];
    for (std::int64_t i = 0; i < head_dim_; ++i) total_[static_cast<std::size_t>(elements + i)] += v[i];
  }
}

void TileStates::sum(std::span<const std::uint8_t> marked, float* matrix, float* vector) const {
  const std::int64_t elements = value_dim_ * head_dim_;
  const auto count =
      static_cast<std::int64_t>(std::count_if(marked.begin(), marked.end(), [](auto m) { return m != 0; }));
  // The difference loses digits where little is left of the total: only when most tiles are marked.
  const bool difference = 2 * count > tiles_;
  std::vector<double> sums(total_.size(), 0.0);
  if (difference) sums = total_;
  const double sign = difference ? -1 : 1;
  for (std::int64_t tile = 0; tile < tiles_; ++tile) {
    if ((marked[static_cast<std::size_t>(tile)] != 0) == difference) continue;
    const float* m = matrices_.data() + tile * elements;
    const float* v = vectors_.data() + tile * head_dim_;
    for (std::int64_t i = 0; i < elements; ++i) sums[static_cast<std::size_t>(i)] += sign * m[i];
    for (std::int64_t i = 0; i < head_dim_; ++i) sums[static_cast<std::size_t>(elements + i)] += sign * v[i];
  }
  for (std::int64_t i = 0; i < elements; ++i) matrix[i] = static_cast<float>(sums[static_cast<std::size_t>(i)]);
  for (std::int64_t i = 0; i < head_dim_; ++i)
    vector[i] = static_cast<float>(sums[static_cast<std::size_t>(elements + i)]);
}

}  // namespace tessera
