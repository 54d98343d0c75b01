#include "methods/layer_list.h"

#include <algorithm>
#include <charconv>

#include "core/error.h"

namespace tessera {

namespace {

constexpr std::int64_t kMostLayers = 100000;

bool read_number(std::string_view text, std::int64_t& number) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  return error == std::errc{} && end == text.data() + text.size() && number >= 0 && number < kMostLayers;
}

}  // namespace

std::vector<std::int64_t> read_layer_list(std::string_view what, std::string_view text) {
  std::vector<std::int64_t> layers;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find('+', begin), text.size());
    const std::string_view part = text.substr(begin, end - begin);
    const std::size_t dash = part.find('-');
    std::int64_t first = 0;
    std::int64_t last = 0;
    const bool valid = read_number(part.substr(0, dash), first) &&
                       read_number(dash == std::string_view::npos ? part : part.substr(dash + 1), last);
    require(valid && first <= last, "{}={}: '{}' is neither a layer nor a range; expected something like 0-2+14+22",
            what, text, part);
    for (std::int64_t layer = first; layer <= last; ++layer) layers.push_back(layer);
    begin = end + 1;
  }
  std::sort(layers.begin(), layers.end());
  layers.erase(std::unique(layers.begin(), layers.end()), layers.end());
  return layers;
}

}  // namespace tessera
