#include "methods/head_classes.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "io/json.h"
#include "methods/parameters.h"

namespace tessera {

HeadClasses read_head_classes(const std::string& path) {
  const Json object = parse_json_file(path);
  const std::string where = fmt::format("head classes '{}'", path);
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
