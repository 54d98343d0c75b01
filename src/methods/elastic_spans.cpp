#include "methods/elastic_spans.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "methods/configuration.h"

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

SpanTable read_span_table(const Configuration& configuration) {
  SpanTable table;
  const HeadTable heads_of_layers = head_table_of(read_configuration(configuration), configuration.name());
  require(!heads_of_layers.empty() && !heads_of_layers[0].empty(), "{}: the table has no heads", configuration.name());
  for (const auto& heads : heads_of_layers) {
    auto& layer = table.emplace_back();
    for (const HeadEntry& entry : heads) layer.push_back({entry.alpha, entry.beta});
  }
  return table;
}

HeadTable head_table_of(const SpanTable& spans) {
  HeadTable table;
  for (const auto& layer : spans) {
    auto& heads = table.emplace_back();
    for (const ElasticSpan& span : layer) {
      heads.push_back({.whole = span == ElasticSpan{}, .gate = {}, .sink = -1, .alpha = span.alpha, .beta = span.beta});
    }
  }
  return table;
}

}  // namespace tessera
