// Linear attention over the key tiles that a query tile marks: the second branch of SLA, forward and backward.
//
// With phi a feature map over channels, H_b = phi(K_b)^T V_b and z_b = column sums of phi(K_b) of key tile b, a query
// tile a with marked tiles M(a) has O = phi(Q) H / (phi(Q) z), H and z summed over M(a).
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

namespace tessera {

/// Feature map of queries and keys.
enum class FeatureMap : std::uint8_t { softmax, elu, relu };

/// phi of `rows` rows of `dim` numbers, in place.
void apply_feature_map(FeatureMap map, std::int64_t rows, std::int64_t dim, float* x);
/// Gradient with respect to x, from that of y = phi(x); in place on d_y.
void feature_map_backward(FeatureMap map, std::int64_t rows, std::int64_t dim, const float* x, const float* y,
                          float* d_y);

/// The matrices [value_dim][head_dim] and vectors [head_dim] of tiles, and sums over some of them.
class TileStates {
 public:
  TileStates(std::int64_t tiles, std::int64_t head_dim, std::int64_t value_dim);

  std::int64_t tiles() const { return tiles_; }
  float* matrix(std::int64_t tile) { return matrices_.data() + tile * value_dim_ * head_dim_; }
  float* vector(std::int64_t tile) { return vectors_.data() + tile * head_dim_; }
  /// Adds up all tiles, for sum(). In order: the result does not depend on threads.
  void add_up();
  /// Sum over the tiles with marked[tile] != 0, [value_dim][head_dim] and [head_dim]. Directly where few are marked,
  /// else the total less the others; a sum of nothing is exactly 0.
  void sum(std::span<const std::uint8_t> marked, float* matrix, float* vector) const;

 private:
  std::int64_t tiles_;
  std::int64_t head_dim_;
  std::int64_t value_dim_;
  std::vector<float> matrices_;
  std::vector<float> vectors_;
  std::vector<double> total_;  ///< matrix, then vector
};

}  // namespace tessera
