#include "support/bare_plan.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <map>
#include <span>
#include <vector>

#include "core/error.h"
#include "eval/random.h"

namespace tessera::cli {

namespace {

using Values = std::map<std::string, double, std::less<>>;

struct Parameter {
  std::string name;
  double default_value;
  double minimum;
  double maximum;
  bool integer;
};

struct Kind {
  std::string name;
  std::string summary;
  std::vector<Parameter> parameters;
  Plan (*build)(const Problem& problem, const Values& values);
};

std::int64_t integer(const Values& values, std::string_view name) {
  return static_cast<std::int64_t>(values.find(name)->second);
}

/// Keys that the first query of a tile may see: a list drawn from them needs no mask.
std::int64_t keys_seen(const Problem& problem, std::int64_t sequence, std::int64_t query) {
  const std::int64_t keys = problem.kv_len_of(sequence);
  return problem.causal ? std::clamp(problem.q_offset_of(sequence) + query + 1, std::int64_t{0}, keys) : keys;
}

/// `count` distinct numbers below `bound`, ascending (drawn again until distinct, or passed over in order when most are
/// taken).
void sample_sorted(eval::Random& random, std::int64_t bound, std::int64_t count, std::vector<std::int32_t>& chosen) {
  chosen.clear();
  if (count * 4 < bound) {
    while (static_cast<std::int64_t>(chosen.size()) < count) {
      while (static_cast<std::int64_t>(chosen.size()) < count) {
        chosen.push_back(static_cast<std::int32_t>(random.below(bound)));
      }
      std::sort(chosen.begin(), chosen.end());
      chosen.erase(std::unique(chosen.begin(), chosen.end()), chosen.end());
    }
    return;
  }
  for (std::int64_t i = 0, left = count; left > 0; ++i) {
    if (random.below(bound - i) >= left) continue;
    chosen.push_back(static_cast<std::int32_t>(i));
    --left;
  }
}

/// Rounds so that the rounded counts of successive rows add up to the sum of the wanted ones.
std::int64_t round_carrying(double wanted, double& carry) {
  const double rounded = std::max(0.0, std::round(wanted + carry));
  carry += wanted - rounded;
  return static_cast<std::int64_t>(rounded);
}

Plan random_block(const Problem& problem, const Values& values) {
  const std::int64_t tile = integer(values, "tile");
  const double density = values.find("density")->second;
  PlanBuilder builder(problem, tile, tile, problem.q_heads, problem.batch);
  std::vector<std::int32_t> chosen;
  for (std::int64_t block = 0; block < builder.blocks(); ++block) {
    const std::int64_t sequence = block / problem.q_heads;
    eval::Random random(static_cast<std::uint64_t>(integer(values, "seed")), {block});
    double carry = 0;
    for (std::int64_t t = 0; t < builder.query_tiles(block); ++t) {
      const std::int64_t last_query = std::min((t + 1) * tile, problem.q_len_of(sequence)) - 1;
      const std::int64_t unmasked_keys = keys_seen(problem, sequence, t * tile);
      const std::int64_t tiles = (keys_seen(problem, sequence, last_query) + tile - 1) / tile;
      const std::int64_t count = std::clamp(round_carrying(density * static_cast<double>(tiles), carry),
                                            std::min(std::int64_t{1}, tiles), tiles);
      sample_sorted(random, tiles, count, chosen);
      for (const std::int32_t k : chosen) {
        const std::int64_t end = std::min((k + 1) * tile, problem.kv_len_of(sequence));
        builder.tiles(k, 1, end <= unmasked_keys ? EntryMask::none : EntryMask::band);
      }
      builder.end_row();
    }
  }
  return std::move(builder).finish();
}

Plan random_token(const Problem& problem, const Values& values) {
  const std::int64_t tile = integer(values, "tile");
  const double density = values.find("density")->second;
  const std::int64_t keys = integer(values, "keys");
  const std::int64_t heads = problem.q_len <= 16 ? problem.kv_heads : problem.q_heads;  // decode shares in the group
  PlanBuilder builder(problem, tile, 128, heads, problem.batch);
  std::vector<std::int32_t> chosen;
  for (std::int64_t block = 0; block < builder.blocks(); ++block) {
    const std::int64_t sequence = block / heads;
    eval::Random random(static_cast<std::uint64_t>(integer(values, "seed")), {block});
    double carry = 0;
    for (std::int64_t t = 0; t < builder.query_tiles(block); ++t) {
      const std::int64_t seen = keys_seen(problem, sequence, t * tile);
      const double wanted = keys > 0 ? static_cast<double>(keys) : density * static_cast<double>(seen);
      const std::int64_t count = std::clamp(round_carrying(wanted, carry), std::min(std::int64_t{1}, seen), seen);
      sample_sorted(random, seen, count, chosen);
      builder.gather(builder.add_tokens(chosen), static_cast<std::int64_t>(chosen.size()));
      builder.end_row();
    }
  }
  return std::move(builder).finish();
}

Plan per_query(const Problem& problem, const Values& values) {
  const std::int64_t size = integer(values, "block");
  const std::int64_t blocks = integer(values, "blocks");
  PlanBuilder builder(problem, 1, size, problem.kv_heads, problem.batch);
  std::vector<std::int32_t> chosen;
  for (std::int64_t block = 0; block < builder.blocks(); ++block) {
    const std::int64_t sequence = block / problem.kv_heads;
    eval::Random random(static_cast<std::uint64_t>(integer(values, "seed")), {block});
    for (std::int64_t query = 0; query < builder.query_tiles(block); ++query) {
      const std::int64_t seen = keys_seen(problem, sequence, query);
      const std::int64_t tiles = (seen + size - 1) / size;
      sample_sorted(random, tiles, std::min(blocks, tiles), chosen);
      for (const std::int32_t k : chosen) {
        const std::int64_t end = std::min((k + 1) * size, problem.kv_len_of(sequence));
        builder.tiles(k, 1, end <= seen ? EntryMask::none : EntryMask::band);
      }
      builder.end_row();
    }
  }
  return std::move(builder).finish();
}

Plan window(const Problem& problem, const Values& values) {
  const std::int64_t size = integer(values, "size");
  const std::int64_t tile = integer(values, "tile");
  PlanBuilder builder(problem, tile, tile, 1, problem.batch);
  const std::int64_t band = builder.add_band({size - 1, 0});
  for (std::int64_t block = 0; block < builder.blocks(); ++block) {
    const std::int64_t keys = problem.kv_len_of(block);
    for (std::int64_t t = 0; t < builder.query_tiles(block); ++t) {
      const std::int64_t first = problem.q_offset_of(block) + t * tile;
      const std::int64_t last = problem.q_offset_of(block) + std::min((t + 1) * tile, problem.q_len_of(block)) - 1;
      const std::int64_t begin = std::clamp(first - size + 1, std::int64_t{0}, keys);
      const std::int64_t end = std::clamp(last + 1, begin, keys);
      builder.run(begin, end - begin, EntryMask::band, band);
      builder.end_row();
    }
  }
  return std::move(builder).finish();
}

Plan dense(const Problem& problem, const Values&) {
  return dense_plan(problem);
}

std::span<const Kind> kinds() {
  constexpr double many = 1 << 30;
  static const std::vector<Kind> list{
      {"dense", "every pair", {}, &dense},
      {"per-query",
       "each query and kv head reads `blocks` random blocks of `block` keys",
       {{"blocks", 16, 1, many, true}, {"block", 64, 1, 65536, true}, {"seed", 1, 0, many, true}},
       &per_query},
      {"random-block",
       "each query tile and head reads a random share of the key tiles",
       {{"tile", 128, 1, 65536, true}, {"density", 0.05, 0, 1, false}, {"seed", 1, 0, many, true}},
       &random_block},
      {"random-token",
       "each query tile and head gathers random tokens: `keys` of them, or a share when keys=0",
       {{"tile", 96, 1, 65536, true},
        {"density", 0.05, 0, 1, false},
        {"keys", 0, 0, many, true},
        {"seed", 1, 0, many, true}},
       &random_token},
      {"window",
       "each query reads the last `size` keys up to its own",
       {{"size", 1024, 1, many, true}, {"tile", 128, 1, 65536, true}},
       &window},
  };
  return list;
}

template <class Rows>
std::vector<std::string> names_of(const Rows& rows) {
  std::vector<std::string> names;
  names.reserve(rows.size());
  for (const auto& row : rows) names.push_back(row.name);
  return names;
}

double parse_value(const Kind& kind, const Parameter& parameter, std::string_view text) {
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  const bool number = error == std::errc{} && end == text.data() + text.size();
  require(number && value >= parameter.minimum && value <= parameter.maximum &&
              (!parameter.integer || value == std::floor(value)),
          "plan '{}': {}={}; expected {} from {} to {}", kind.name, parameter.name, text,
          parameter.integer ? "an integer" : "a number", parameter.minimum, parameter.maximum);
  return value;
}

Values parse_values(const Kind& kind, std::string_view text) {
  Values values;
  for (const Parameter& parameter : kind.parameters) values[parameter.name] = parameter.default_value;
  while (!text.empty()) {
    const std::string_view item = text.substr(0, text.find(','));
    text.remove_prefix(std::min(text.size(), item.size() + 1));
    const std::size_t equals = item.find('=');
    require(equals != std::string_view::npos, "plan '{}': '{}' is not key=value", kind.name, item);
    const std::string_view key = item.substr(0, equals);
    const auto parameter =
        std::find_if(kind.parameters.begin(), kind.parameters.end(), [&](const Parameter& p) { return p.name == key; });
    require(!kind.parameters.empty(), "plan '{}' has no parameters; got '{}'", kind.name, key);
    require(parameter != kind.parameters.end(), "plan '{}' has no parameter '{}'; did you mean '{}'?", kind.name, key,
            nearest_name(key, names_of(kind.parameters)));
    values[parameter->name] = parse_value(kind, *parameter, item.substr(equals + 1));
  }
  return values;
}

}  // namespace

BarePlan make_bare_plan(std::string_view spec, const Problem& problem) {
  const std::string_view name = spec.substr(0, spec.find(':'));
  const auto kind = std::find_if(kinds().begin(), kinds().end(), [&](const Kind& k) { return k.name == name; });
  require(kind != kinds().end(), "unknown plan '{}'; did you mean '{}'?", name, nearest_name(name, names_of(kinds())));
  const Values values = parse_values(*kind, name.size() == spec.size() ? "" : spec.substr(name.size() + 1));

  BarePlan result{kind->name, nlohmann::ordered_json::object(), kind->build(problem, values)};
  for (const Parameter& parameter : kind->parameters) {
    const double value = values.find(parameter.name)->second;
    if (parameter.integer) {
      result.parameters[parameter.name] = static_cast<std::int64_t>(value);
    } else {
      result.parameters[parameter.name] = value;
    }
  }
  return result;
}

std::string bare_plan_help() {
  std::string text;
  for (const Kind& kind : kinds()) {
    std::vector<std::string> defaults;
    defaults.reserve(kind.parameters.size());
    for (const Parameter& p : kind.parameters) defaults.push_back(fmt::format("{}={}", p.name, p.default_value));
    text += fmt::format("  {}{}{}\n      {}\n", kind.name, defaults.empty() ? "" : ":", fmt::join(defaults, ","),
                        kind.summary);
  }
  return text;
}

}  // namespace tessera::cli
