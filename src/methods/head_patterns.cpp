#include "methods/head_patterns.h"

#include <array>
#include <charconv>

#include "core/error.h"
#include "methods/configuration.h"

namespace tessera {

namespace {

struct NamedKind {
  std::string_view name;
  HeadPattern::Kind kind;
};
constexpr std::array<NamedKind, 4> kKinds{{{"vertical_and_slash", HeadPattern::Kind::vertical_and_slash},
                                           {"stream_llm", HeadPattern::Kind::stream_llm},
                                           {"a_shape", HeadPattern::Kind::stream_llm},
                                           {"block_sparse", HeadPattern::Kind::block_sparse}}};

std::int64_t head_number(const std::string& text, std::string_view where) {
  std::int64_t head = -1;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), head);
  require(error == std::errc{} && end == text.data() + text.size() && head >= 0 && head < 65536,
          "{}: '{}' is not a head number", where, text);
  return head;
}

}  // namespace

HeadPattern head_pattern_of(const Json& value, std::string_view where) {
  require(value.is_array() && value.size() >= 3 && value.size() <= 4 && value[0].is_string(),
          "{}: expected [pattern, size, size, score]; got {}", where, value.dump());
  const std::string name = value[0].get<std::string>();
  HeadPattern pattern;
  bool known = false;
  for (const NamedKind& kind : kKinds) {
    if (kind.name != name) continue;
    pattern.kind = kind.kind;
    known = true;
  }
  require(known, "{}: unknown pattern '{}'; expected vertical_and_slash, stream_llm (a_shape) or block_sparse", where,
          name);
  for (const std::size_t i : {std::size_t{1}, std::size_t{2}}) {
    const bool valid = value[i].is_number_integer() && value[i].get<double>() >= 0 &&
                       value[i].get<double>() <= static_cast<double>(kMostTokens);
    require(valid, "{}: size {} is not an integer in [0, {}]", where, value[i].dump(), kMostTokens);
  }
  pattern.first = value[1].get<std::int64_t>();
  pattern.second = value[2].get<std::int64_t>();
  return pattern;
}

HeadPatterns read_head_patterns(const Configuration& configuration) {
  const Json layers = read_configuration(configuration);
  const std::string path = configuration.name();
  require(layers.is_array(), "head configuration '{}' is not an array with one object per layer", path);
  HeadPatterns patterns;
  for (const Json& layer : layers) {
    const std::string where = fmt::format("head configuration '{}', layer {}", path, patterns.size());
    require(layer.is_object(), "{}: expected an object of heads", where);
    auto& heads = patterns.emplace_back();
    for (const auto& [head, value] : layer.items()) {
      heads[head_number(head, where)] = head_pattern_of(value, fmt::format("{}, head {}", where, head));
    }
  }
  return patterns;
}

Json head_pattern_json(const HeadPattern& pattern, double score) {
  for (const NamedKind& kind : kKinds) {
    if (kind.kind == pattern.kind) return {kind.name, pattern.first, pattern.second, score};
  }
  return {};
}

}  // namespace tessera
