// Rotary scalings of config.json, in both spellings: `rope_scaling` beside `rope_theta`, and the newer
// `rope_parameters` that holds both, or one such object per kind of layer.
#include <array>
#include <cmath>

#include "model/architectures.h"

namespace tessera {

namespace {

struct ScalingName {
  std::string_view name;
  RopeScaling scaling;
};
constexpr std::array kScalings{
    ScalingName{"default", RopeScaling::none},    ScalingName{"linear", RopeScaling::linear},
    ScalingName{"dynamic", RopeScaling::dynamic}, ScalingName{"yarn", RopeScaling::yarn},
    ScalingName{"llama3", RopeScaling::llama3},   ScalingName{"longrope", RopeScaling::longrope}};

double yarn_scale(double factor, double mscale) {
  return factor <= 1 ? 1 : 0.1 * mscale * std::log(factor) + 1;
}

}  // namespace

std::string_view name_of(RopeScaling scaling) {
  for (const ScalingName& known : kScalings) {
    if (known.scaling == scaling) return known.name;
  }
  return "?";
}

double yarn_attention_factor(double factor, double mscale, double mscale_all_dim) {
  if (mscale == 0 || mscale_all_dim == 0) return yarn_scale(factor, 1);
  return yarn_scale(factor, mscale) / yarn_scale(factor, mscale_all_dim);
}

double longrope_attention_factor(double factor, std::int64_t original_positions) {
  if (factor <= 1) return 1;
  return std::sqrt(1 + std::log(factor) / std::log(static_cast<double>(original_positions)));
}

namespace model {

namespace {

RopeScaling scaling_of(const ConfigReader& rope, const ModelConfig& config) {
  const auto older = rope.value_or<std::string>("type", "default");
  auto name = rope.value_or<std::string>("rope_type", older);
  if (name == "none") name = "default";
  // Early Phi-3 files call longrope so.
  if (name == "su" || (name == "yarn" && config.architecture == "phi3")) name = "longrope";
  for (const ScalingName& known : kScalings) {
    if (known.name == name) return known.scaling;
  }
  fail("{} has type '{}', which is not supported; supported: default, linear, dynamic, yarn, llama3, longrope",
       rope.name(), name);
}

std::vector<double> read_factors(const ConfigReader& rope, std::string_view key, std::int64_t expected) {
  const Json* list = rope.find(key);
  require(list != nullptr && list->is_array(), "{}: '{}' is missing; expected a list of {} numbers", rope.name(), key,
          expected);
  require(std::ssize(*list) == expected, "{}: '{}' has {} entries; expected half of the rotated dimensions, {}",
          rope.name(), key, list->size(), expected);
  std::vector<double> factors;
  for (const Json& entry : *list) {
    require(entry.is_number(), "{}: '{}' has an entry that is no number", rope.name(), key);
    factors.push_back(entry.get<double>());
  }
  return factors;
}

void read_yarn(const ConfigReader& rope, RopeConfig& result) {
  const double computed =
      yarn_attention_factor(result.factor, rope.value_or("mscale", 0.0), rope.value_or("mscale_all_dim", 0.0));
  result.attention_factor = rope.positive_or("attention_factor", computed);
  result.beta_fast = rope.positive_or("beta_fast", 32);
  result.beta_slow = rope.positive_or("beta_slow", 1);
  result.whole_dims = rope.value_or("truncate", true);
}

/// `file` is the whole configuration, `rope` the object of these layers.
RopeConfig read_one(const ConfigReader& file, const ConfigReader& rope, double theta, const ModelConfig& config) {
  RopeConfig result;
  result.theta = rope.positive_or("rope_theta", theta);
  result.scaling = scaling_of(rope, config);
  const double rotated = rope.positive_or("partial_rotary_factor", file.positive_or("partial_rotary_factor", 1));
  require(rotated <= 1, "{}: 'partial_rotary_factor' is {}; expected above 0 and at most 1", rope.name(), rotated);
  const auto dims = static_cast<std::int64_t>(static_cast<double>(config.head_dim) * rotated);
  require(dims >= 2 && dims % 2 == 0,
          "{}: 'partial_rotary_factor' {} leaves {} of {} dimensions; expected an even number", rope.name(), rotated,
          dims, config.head_dim);
  result.dims = dims == config.head_dim ? 0 : dims;
  if (result.scaling == RopeScaling::none) return result;

  const std::int64_t original = rope.size_or("original_max_position_embeddings", config.max_positions, kMostPositions);
  const std::int64_t beside = file.size_or("original_max_position_embeddings", original, kMostPositions);
  result.original_positions = result.scaling == RopeScaling::dynamic ? config.max_positions : beside;
  const double ratio = static_cast<double>(config.max_positions) / static_cast<double>(result.original_positions);
  const bool may_follow = result.scaling == RopeScaling::yarn || result.scaling == RopeScaling::longrope;
  result.factor = may_follow ? rope.positive_or("factor", ratio) : rope.positive("factor");
  switch (result.scaling) {
    case RopeScaling::yarn:
      read_yarn(rope, result);
      break;
    case RopeScaling::llama3:
      result.low_frequency_factor = rope.positive("low_freq_factor");
      result.high_frequency_factor = rope.positive("high_freq_factor");
      break;
    case RopeScaling::longrope:
      require(result.original_positions > 1, "{}: 'original_max_position_embeddings' is {}; expected at least 2",
              rope.name(), result.original_positions);
      result.attention_factor =
          rope.positive_or("attention_factor", longrope_attention_factor(result.factor, result.original_positions));
      result.short_factors = read_factors(rope, "short_factor", dims / 2);
      result.long_factors = read_factors(rope, "long_factor", dims / 2);
      break;
    default:
      break;
  }
  return result;
}

}  // namespace

void read_rope(const ConfigReader& reader, double theta, ModelConfig& config) {
  theta = reader.positive_or("rope_theta", theta);
  const bool two_kinds = std::any_of(config.layer_kinds.begin(), config.layer_kinds.end(),
                                     [](const LayerConfig& layer) { return layer.rope == LayerRope::local; });
  const std::string_view key = reader.find("rope_scaling") != nullptr ? "rope_scaling" : "rope_parameters";
  const Json nothing = Json::object();
  const ConfigReader plain(nothing, reader.name());
  if (two_kinds) config.local_rope = read_one(reader, plain, reader.positive_or("rope_local_base_freq", 10000), config);
  if (reader.find(key) == nullptr) {
    config.rope = read_one(reader, plain, theta, config);
    return;
  }
  const ConfigReader rope = reader.inside(key);
  if (rope.find("full_attention") == nullptr && rope.find("sliding_attention") == nullptr) {
    config.rope = read_one(reader, rope, theta, config);
    return;
  }
  config.rope =
      read_one(reader, rope.find("full_attention") == nullptr ? plain : rope.inside("full_attention"), theta, config);
  if (rope.find("sliding_attention") == nullptr) return;
  const RopeConfig local = read_one(reader, rope.inside("sliding_attention"), 10000, config);
  if (two_kinds) {
    config.local_rope = local;
  } else {
    require(local == config.rope, "{}: the two kinds of layers differ, which {} does not support", rope.name(),
            config.architecture);
  }
}

}  // namespace model

}  // namespace tessera
