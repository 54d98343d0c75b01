// How rows of channels lie in float memory.
#pragma once

#include <cstdint>

namespace tessera::recurrent {

/// Whole 16 columns.
inline std::int64_t padded_columns(std::int64_t dim) {
  return (dim + 15) / 16 * 16;
}
/// An odd number of 16 floats, so that walking down a column does not fall into few cache sets.
inline std::int64_t padded_stride(std::int64_t columns) {
  return columns / 16 % 2 == 0 ? columns + 16 : columns;
}

}  // namespace tessera::recurrent
