#include "recurrent/tile_states.h"

#include "recurrent/padding.h"

namespace tessera::recurrent {

TileStateShape tile_state_shape(std::int64_t head_dim, std::int64_t value_dim, FeatureMap map, float floor) {
  TileStateShape shape;
  shape.head_dim = head_dim;
  shape.value_dim = value_dim;
  shape.key_columns = padded_columns(head_dim);
  shape.value_columns = padded_columns(value_dim);
  shape.key_stride = padded_stride(shape.key_columns);
  shape.value_stride = padded_stride(shape.value_columns);
  shape.map = map;
  shape.floor = floor;
  // An odd number of the pieces that sums take: pieces of all states spread over the sets of the cache.
  const std::int64_t pieces = (shape.vector_at() + shape.key_columns + kSumFloats - 1) / kSumFloats;
  shape.state_floats = (pieces / 2 * 2 + 1) * kSumFloats;
  return shape;
}

}  // namespace tessera::recurrent
