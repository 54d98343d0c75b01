// The parameters of `gna` as a neighbourhood on the grid of a call: what the method plans, and what its simulator
// predicts of it.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "score/neighborhood_simulator.h"
#include "tessera/core.h"

namespace tessera {

/// As SPEC has them: one number per axis.
struct NeighborhoodTexts {
  std::string window = "18x24x24";
  std::string stride = "16x8x8";
  std::string dilation = "1";
  std::string causal = "0";
  std::string tile_q = "0";
  std::string tile_k = "0";
};

class NeighborhoodParameters {
 public:
  /// Throws Error naming the parameter.
  explicit NeighborhoodParameters(const NeighborhoodTexts& texts);

  /// The neighbourhood of one sequence: windows cut to the axes; a plain causal sequence is a causal axis.
  score::Neighborhood axes_of(const Problem& problem, std::int64_t sequence) const;
  /// The shapes that were asked for, the cheapest by the simulator where none were.
  score::TileShapes tiles_for(const score::Neighborhood& axes) const;
  bool names_query_tile() const { return tile_q_[0] != 0; }

 private:
  score::Extent window_;
  score::Extent stride_;
  score::Extent dilation_;
  score::Extent causal_;
  score::Extent tile_q_;  ///< zeros: chosen
  score::Extent tile_k_;
};

/// What the simulator predicts for one head of a call of `gna` with these parameters (JSON, as Method::parameters()
/// gives them). Nothing where it does not model the call: text beside the grid, queries other than all tokens,
/// sequences of different lengths, causality in raster order on top of the windows.
std::optional<score::NeighborhoodCost> simulate_call(const Problem& problem, std::string_view parameters);

}  // namespace tessera
