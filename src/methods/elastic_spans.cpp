#include "methods/elastic_spans.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "io/json.h"
#include "methods/parameters.h"

namespace tessera {

std::int64_t span_cache_tokens(const ElasticSpan& rule, std::int64_t length) {
  const double wanted = std::floor(rule.alpha + rule.beta * static_cast<double>(length));
  const auto tokens = static_cast<std::int64_t>(std::clamp(wanted, 0.0, static_cast<double>(length)));
  return (std::max(tokens, 2 * kSpanBlock) + kSpanBlock - 1) / kSpanBlock * kSpanBlock;
}

std::int64_t span_blocks(const ElasticSpan& rule, std::int64_t length) {
  const std::int64_t blocks = (length + kSpanBlock - 1) / kSpanBlock;
  return std::min(span_cache_tokens(rule, length) / kSpanBlock, std::max<std::int64_t>(blocks, 1));
}

SpanTable read_span_table(const std::string& path) {
  const Json file = parse_json_file(path);
  const Json layers = get<Json>(file, "heads", path);
  require(layers.is_array(), "{}: 'heads' is not a list with one list per layer", path);
  SpanTable table;
  for (const Json& layer : layers) {
    require(layer.is_array(), "{}: layer {} is not a list of heads", path, table.size());
    std::vector<ElasticSpan> heads;
    for (const Json& head : layer) {
      const std::string where = fmt::format("{}, layer {}, head {}", path, table.size(), heads.size());
      require(head.is_object(), "{}: expected an object; got {}", where, head.dump());
      const auto name = get_or<std::string>(head, "class", where, "span");
      require(name == "span" || name == "full", "{}: class is '{}'; expected span or full", where, name);
      ElasticSpan rule;
      if (name == "span") {
        rule = {get<double>(head, "alpha", where), get<double>(head, "beta", where)};
        require(std::abs(rule.alpha) <= static_cast<double>(kMostTokens) && rule.beta >= 0 && rule.beta <= 1,
                "{}: alpha is {}, beta {}; expected 31-bit tokens and 0 to 1", where, rule.alpha, rule.beta);
      }
      heads.push_back(rule);
    }
    table.push_back(std::move(heads));
  }
  return table;
}

std::string span_table_json(const SpanTable& table) {
  Json layers = Json::array();
  for (const auto& heads : table) {
    Json layer = Json::array();
    for (const ElasticSpan& rule : heads)
      layer.push_back({{"class", "span"}, {"alpha", rule.alpha}, {"beta", rule.beta}});
    layers.push_back(std::move(layer));
  }
  return Json{{"heads", std::move(layers)}}.dump(1);
}

}  // namespace tessera
