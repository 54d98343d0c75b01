#include "recurrent/tile_states.h"

namespace tessera::recurrent {

TileStateShape tile_state_shape(std::int64_t head_dim, std::int64_t value_dim, FeatureMap map, float floor) {
  const auto columns = [](std::int64_t dim) { return (dim + 15) / 16 * 16; };
  const auto stride = [](std::int64_t width) { return width / 16 % 2 == 0 ? width + 16 : width; };
  TileStateShape shape;
  shape.head_dim = head_dim;
  shape.value_dim = value_dim;
  shape.key_columns = columns(head_dim);
  shape.value_columns = columns(value_dim);
  shape.key_stride = stride(shape.key_columns);
  shape.value_stride = stride(shape.value_columns);
  shape.map = map;
  shape.floor = floor;
  // An odd number of the pieces that sums take: pieces of all states spread over the sets of the cache.
  const std::int64_t pieces = (shape.vector_at() + shape.key_columns + kSumFloats - 1) / kSumFloats;
  shape.state_floats = (pieces / 2 * 2 + 1) * kSumFloats;
  return shape;
}

}  // namespace tessera::recurrent
