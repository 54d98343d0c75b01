#include "methods/neighborhood_parameters.h"

#include <algorithm>

#include "core/error.h"
#include "io/json.h"
#include "methods/axis_values.h"

namespace tessera {

namespace {

using score::Extent;

/// Larger tiles than this are cut by the kernels anyway.
constexpr std::int64_t kMostTileTokens = 128;

Extent tile_shape(std::string_view name, const std::string& text) {
  const Extent shape = axis_values("gna", name, text, text == "0" ? 0 : 1, 1);
  if (text == "0") return {0, 0, 0};
  std::int64_t tokens = 1;
  for (const std::int64_t size : shape) {
    require(size <= kMostTileTokens, "gna: {} is '{}'; expected at most {} tokens", name, text, kMostTileTokens);
    tokens *= size;
  }
  require(tokens <= kMostTileTokens, "gna: {} is '{}', {} tokens; expected at most {}", name, text, tokens,
          kMostTileTokens);
  return shape;
}

}  // namespace

NeighborhoodParameters::NeighborhoodParameters(const NeighborhoodTexts& texts)
    : window_(axis_values("gna", "window", texts.window, 0, 0)),
      stride_(axis_values("gna", "stride", texts.stride, 1, 1)),
      dilation_(axis_values("gna", "dilation", texts.dilation, 1, 1)),
      causal_(axis_values("gna", "causal", texts.causal, 0, 0)),
      tile_q_(tile_shape("tile_q", texts.tile_q)),
      tile_k_(tile_shape("tile_k", texts.tile_k)) {
  for (int a = 0; a < 3; ++a) {
    require(window_[a] == 0 || stride_[a] <= window_[a], "gna: stride is '{}'; expected at most the window '{}'",
            texts.stride, texts.window);
    require(causal_[a] <= 1, "gna: causal is '{}'; expected 0 or 1 for each axis", texts.causal);
  }
}

score::Neighborhood NeighborhoodParameters::axes_of(const Problem& problem, std::int64_t sequence) const {
  const Extent extent = problem.grid_of(sequence).extent;
  score::Neighborhood axes{};
  for (int a = 0; a < 3; ++a) {
    const std::int64_t window = window_[a] == 0 ? extent[a] : std::min(window_[a], extent[a]);
    axes[a] = {.length = extent[a],
               .window = window,
               .stride = std::min(stride_[a], std::max<std::int64_t>(window, 1)),
               .dilation = dilation_[a],
               .causal = causal_[a] == 1};
  }
  if (problem.causal && extent[0] == 1 && extent[1] == 1) axes[2].causal = true;
  return axes;
}

score::TileShapes NeighborhoodParameters::tiles_for(const score::Neighborhood& axes) const {
  score::TileShapes tiles{tile_q_, tile_k_};
  if (tile_q_[0] != 0 && tile_k_[0] != 0) return tiles;
  const score::TileShapes chosen = score::choose_tiles(axes, kMostTileTokens, kMostTileTokens);
  if (tile_q_[0] == 0) tiles.q = chosen.q;
  if (tile_k_[0] == 0) tiles.k = chosen.k;
  return tiles;
}

std::optional<score::NeighborhoodCost> simulate_call(const Problem& problem, std::string_view parameters) {
  if (problem.variable_length() || problem.q_len != problem.kv_len) return {};
  const TokenGrid grid = problem.grid_of(0);
  if (grid.prefix + grid.suffix > 0) return {};
  const bool one_axis = grid.extent[0] == 1 && grid.extent[1] == 1;
  if (problem.causal && !one_axis) return {};
  const Json json = Json::parse(parameters);
  NeighborhoodTexts texts;
  const auto read = [&](const char* name, std::string& text) { text = json.value(name, text); };
  read("window", texts.window);
  read("stride", texts.stride);
  read("dilation", texts.dilation);
  read("causal", texts.causal);
  read("tile_q", texts.tile_q);
  read("tile_k", texts.tile_k);
  const NeighborhoodParameters neighborhood(texts);
  const score::Neighborhood axes = neighborhood.axes_of(problem, 0);
  return score::simulate(axes, neighborhood.tiles_for(axes));
}

}  // namespace tessera
