#include "methods/head_table.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "core/error.h"
#include "methods/parameters.h"

namespace tessera {

namespace {

HeadEntry entry_of(const Json& head, const std::string& where) {
  constexpr std::array<std::string_view, 5> known{"class", "alpha", "beta", "sink", "gate"};
  require(head.is_object(), "{}: expected an object; got {}", where, head.dump());
  for (const auto& [key, value] : head.items()) {
    require(std::find(known.begin(), known.end(), key) != known.end(), "{}: unknown key '{}'; expected {}", where, key,
            fmt::join(known, ", "));
  }
  HeadEntry entry;
  const auto name = get_or<std::string>(head, "class", where, "span");
  require(name == "span" || name == "full", "{}: class is '{}'; expected span or full", where, name);
  entry.whole = name == "full";
  if (!entry.whole) {
    entry.alpha = get<double>(head, "alpha", where);
    entry.beta = get<double>(head, "beta", where);
    require(std::abs(entry.alpha) <= static_cast<double>(kMostTokens) && entry.beta >= 0 && entry.beta <= 1,
            "{}: alpha is {}, beta {}; expected 31-bit tokens and 0 to 1", where, entry.alpha, entry.beta);
  }
  entry.sink = get_or<std::int64_t>(head, "sink", where, -1);
  require(entry.sink >= -1 && entry.sink <= kMostTokens, "{}: sink is {}; expected 0 to {}", where, entry.sink,
          kMostTokens);
  entry.gate = get_optional<double>(head, "gate", where);
  require(!entry.gate || (*entry.gate >= 0 && *entry.gate <= 1), "{}: gate is {}; expected a number in [0, 1]", where,
          entry.gate.value_or(0));
  return entry;
}

}  // namespace

HeadTable head_table_of(const Json& document, std::string_view where) {
  const Json layers = get<Json>(document, "heads", where);
  require(layers.is_array(), "{}: 'heads' is not a list with one list per layer", where);
  HeadTable table;
  for (const Json& layer : layers) {
    require(layer.is_array() && layer.size() == layers[0].size(),
            "{}: layer {} is not a list of heads, as many as in layer 0", where, table.size());
    std::vector<HeadEntry> heads;
    for (const Json& head : layer) {
      heads.push_back(entry_of(head, fmt::format("{}, layer {}, head {}", where, table.size(), heads.size())));
    }
    table.push_back(std::move(heads));
  }
  return table;
}

Json head_table_json(const HeadTable& table) {
  Json layers = Json::array();
  for (const auto& heads : table) {
    Json layer = Json::array();
    for (const HeadEntry& entry : heads) {
      Json head{{"class", entry.whole ? "full" : "span"}};
      if (!entry.whole) {
        head["alpha"] = entry.alpha;
        head["beta"] = entry.beta;
      }
      if (entry.sink >= 0) head["sink"] = entry.sink;
      if (entry.gate) head["gate"] = *entry.gate;
      layer.push_back(std::move(head));
    }
    layers.push_back(std::move(layer));
  }
  return {{"heads", std::move(layers)}};
}

}  // namespace tessera
