#include "methods/grid_order.h"

#include <numeric>

#include "methods/axis_values.h"
#include "score/token_order.h"

namespace tessera {

void GridOrder::check(std::string_view method) const {
  axis_values(method, "tile", tile, 1, 1);
}

std::vector<std::int32_t> GridOrder::tokens(const TokenGrid& grid) const {
  if (order == Kind::gilbert) return score::with_text(grid, score::gilbert_order(grid.extent));
  if (order == Kind::tile) {
    return score::with_text(grid, score::GridTiling(grid.extent, axis_values("", "tile", tile, 1, 1)).order());
  }
  std::vector<std::int32_t> tokens(static_cast<std::size_t>(grid.tokens()));
  std::iota(tokens.begin(), tokens.end(), 0);
  return tokens;
}

}  // namespace tessera
