// Plan maps as PNG images for pages without a network.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include "view/plan_map.h"

namespace tessera {

/// One pixel per cell. Cells that the hard mask excludes are transparent, cells that the plan skips grey, computed ones
/// go from light to dark with their share, on a scale that keeps single tokens visible (see shade_of_share).
std::vector<std::byte> png_of(const PlanMap& map);

/// Position of a share (0, 1] on the colour scale, in (0, 1].
double shade_of_share(double share);
/// "#rrggbb" of a share; 0 is the grey of skipped cells.
std::string colour_of_share(double share);

/// data:<type>;base64,... for the src of an image.
std::string data_uri(std::string_view type, std::span<const std::byte> bytes);

}  // namespace tessera
