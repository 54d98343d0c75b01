// Lists of layers as parameters name them: numbers and ranges joined by +, "0-2+14+22".
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace tessera {

/// Ascending, without repeats. `what` begins the messages. Throws Error for anything else.
std::vector<std::int64_t> read_layer_list(std::string_view what, std::string_view text);

}  // namespace tessera
