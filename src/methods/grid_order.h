// The parameters `order` and `tile` of methods that reorder the tokens of a grid before they cut them into blocks.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "methods/parameters.h"
#include "tessera/core.h"

namespace tessera {

struct GridOrder {
  enum class Kind : std::uint8_t { raster, tile, gilbert };
  Kind order = Kind::gilbert;
  std::string tile = "2x8x8";

  void visit(ParameterList& v) {
    v("order", order, {"raster", "tile", "gilbert"},
      "order of the grid tokens: as they are, tile by tile, or along a space-filling curve");
    v("tile", tile, "tile of that order, TxHxW, HxW or W");
  }
  /// Throws Error where `tile` is not a shape.
  void check(std::string_view method) const;
  /// All tokens of a sequence in this order, text behind the grid.
  std::vector<std::int32_t> tokens(const TokenGrid& grid) const;
};

}  // namespace tessera
