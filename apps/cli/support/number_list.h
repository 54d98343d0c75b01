// Lists of numbers on the command line.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace tessera::cli {

/// "0.5,0.1" as numbers; empty text gives an empty list. Throws Error that names the flag for text that is no number
/// and for numbers outside of (low, high].
std::vector<double> number_list(std::string_view flag, const std::string& text, double low, double high);

}  // namespace tessera::cli
