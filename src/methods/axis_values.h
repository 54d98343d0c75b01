// Parameters that hold one number per axis of the token grid, as text: "18x24x24", "8x16", "64".
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

namespace tessera {

/// Numbers of the axes (frames, rows, columns), read from one to three numbers joined by x; they belong to the last
/// axes, missing ones are `missing`. Throws Error naming method and parameter for anything else and for numbers below
/// `minimum`.
std::array<std::int64_t, 3> axis_values(std::string_view method, std::string_view parameter, const std::string& text,
                                        std::int64_t minimum, std::int64_t missing);

}  // namespace tessera
