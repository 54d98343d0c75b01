#include "methods/head_classes.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "methods/configuration.h"
#include "methods/head_table.h"

namespace tessera {

namespace {

HeadClasses classes_of(const HeadTable& table, std::string_view where) {
  require(!table.empty() && !table[0].empty(), "{}: the table has no heads", where);
  HeadClasses classes;
  for (const auto& layer : table) {
    auto& gates = classes.gates.emplace_back();
    for (const HeadEntry& head : layer) {
      gates.push_back(head.gate.value_or(head.whole ? 1 : 0));
      if (head.whole || head.beta != 0 || head.sink < 0) continue;
      const auto recent = static_cast<std::int64_t>(head.alpha) - head.sink;
      require(recent >= 1, "{}: layer {}, head {}: a span of {} tokens has no place behind {} sinks", where,
              classes.gates.size() - 1, gates.size() - 1, head.alpha, head.sink);
      require(classes.sink < 0 || (classes.sink == head.sink && classes.recent == recent),
              "{}: layer {}, head {}: {} sinks and {} recent tokens differ from the {} and {} of an earlier head",
              where, classes.gates.size() - 1, gates.size() - 1, head.sink, recent, classes.sink, classes.recent);
      classes.sink = head.sink;
      classes.recent = recent;
    }
  }
  return classes;
}

}  // namespace

HeadClasses read_head_classes(const Configuration& configuration) {
  const Json object = read_configuration(configuration);
  const std::string where = fmt::format("head classes '{}'", configuration.name());
  if (object.is_object() && object.contains("heads")) return classes_of(head_table_of(object, where), where);
  require(object.is_object() && object.contains("retrieval") && object["retrieval"].is_array() &&
              !object["retrieval"].empty(),
          "{}: expected {{\"retrieval\": [[gate of each kv head], ... per layer], \"sink\": n, \"recent\": n}}", where);
  HeadClasses classes;
  for (const auto& [key, value] : object.items()) {
    if (key == "retrieval") continue;
    require(key == "sink" || key == "recent", "{}: unknown key '{}'; expected retrieval, sink and recent", where, key);
    const auto tokens = get<std::int64_t>(object, key, where);
    const std::int64_t least = key == "sink" ? 0 : 1;
    require(tokens >= least && tokens <= kMostTokens, "{}: {} is {}; expected {} to {}", where, key, tokens, least,
            kMostTokens);
    (key == "sink" ? classes.sink : classes.recent) = tokens;
  }
  for (const Json& layer : object["retrieval"]) {
    const std::size_t index = classes.gates.size();
    require(layer.is_array() && !layer.empty() && layer.size() == object["retrieval"][0].size(),
            "{}: layer {} is not a list of one gate per kv head, as many as in layer 0", where, index);
    auto& gates = classes.gates.emplace_back();
    for (const Json& gate : layer) {
      require(gate.is_number() && gate.get<double>() >= 0 && gate.get<double>() <= 1,
              "{}: layer {}, head {}: gate {} is not a number in [0, 1]", where, index, gates.size(), gate.dump());
      gates.push_back(gate.get<double>());
    }
  }
  return classes;
}

std::vector<std::vector<bool>> HeadClasses::retrieval(double threshold, double sparsity) const {
  struct Place {
    double gate;
    std::size_t layer;
    std::size_t head;
  };
  std::vector<std::vector<bool>> result;
  std::vector<Place> order;
  for (std::size_t layer = 0; layer < gates.size(); ++layer) {
    auto& heads = result.emplace_back();
    for (std::size_t head = 0; head < gates[layer].size(); ++head) {
      heads.push_back(sparsity >= 0 || gates[layer][head] >= threshold);
      order.push_back({gates[layer][head], layer, head});
    }
  }
  if (sparsity < 0) return result;
  std::reverse(order.begin(), order.end());
  std::stable_sort(order.begin(), order.end(), [](const Place& a, const Place& b) { return a.gate < b.gate; });
  const auto streaming = static_cast<std::size_t>(std::floor(sparsity * static_cast<double>(order.size())));
  for (std::size_t i = 0; i < streaming; ++i) result[order[i].layer][order[i].head] = false;
  return result;
}

}  // namespace tessera
