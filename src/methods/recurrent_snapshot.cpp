#include "tessera/recurrent_snapshot.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <string>
#include <string_view>
#include <vector>

#include "core/error.h"
#include "io/safetensors.h"
#include "methods/recurrent_attention.h"

namespace tessera {

namespace {

constexpr std::string_view kFormat = "tessera-recurrent-method";

const RecurrentMethodState& recurrent(const MethodState& state) {
  const auto* found = dynamic_cast<const RecurrentMethodState*>(&state);
  require(found != nullptr, "the state is not one of a recurrent method; expected one from its new_state()");
  return *found;
}

/// The layer and the rest of "layer.L.rest"; throws Error for another name.
std::pair<std::int64_t, std::string_view> parts_of(const SafetensorsFile& file, std::string_view name) {
  constexpr std::string_view prefix = "layer.";
  std::int64_t layer = -1;
  if (name.starts_with(prefix)) {
    const std::string_view rest = name.substr(prefix.size());
    const auto [end, error] = std::from_chars(rest.data(), rest.data() + rest.size(), layer);
    const auto used = static_cast<std::size_t>(end - rest.data());
    if (error == std::errc{} && layer >= 0 && used < rest.size() && rest[used] == '.') {
      return {layer, rest.substr(used + 1)};
    }
  }
  fail("{}: unknown tensor '{}'; expected layer.L.state, layer.L.tokens or layer.L.tail.NAME", file.name(), name);
}

std::vector<float> finite_numbers(const SafetensorsFile& file, const std::string& name) {
  std::vector<float> values = file.copy<float>(name);
  require(std::all_of(values.begin(), values.end(), [](float x) { return std::isfinite(x); }),
          "{}: tensor '{}' holds a number that is not finite", file.name(), name);
  return values;
}

void load_states(const SafetensorsFile& file, const std::string& name, RecurrentState& states) {
  const std::vector<std::int64_t>& shape = file.info(name).shape;
  require(shape.size() == 4, "{}: tensor '{}' has shape [{}]; expected 4 axes: sequences, heads, head_dim, value_dim",
          file.name(), name, fmt::join(shape, ", "));
  states = RecurrentState(
      {.layers = 1, .sequences = shape[0], .heads = shape[1], .head_dim = shape[2], .value_dim = shape[3]});
  const std::vector<float> values = finite_numbers(file, name);
  std::copy(values.begin(), values.end(), states.layer(0).begin());
}

void load_tokens(const SafetensorsFile& file, const std::string& name, RecurrentState& states) {
  const std::vector<std::int64_t> expected{states.shape().sequences};
  require(file.info(name).shape == expected, "{}: tensor '{}' has shape [{}]; expected [{}]", file.name(), name,
          fmt::join(file.info(name).shape, ", "), fmt::join(expected, ", "));
  const std::vector<std::int64_t> tokens = file.copy<std::int64_t>(name);
  require(std::all_of(tokens.begin(), tokens.end(), [](std::int64_t n) { return n >= 0; }),
          "{}: tensor '{}' holds a negative number", file.name(), name);
  std::copy(tokens.begin(), tokens.end(), states.tokens(0).begin());
}

}  // namespace

std::unique_ptr<MethodState> copy_recurrent_state(const MethodState& state) {
  return std::make_unique<RecurrentMethodState>(recurrent(state));
}

void save_recurrent_state(const MethodState& state, const std::filesystem::path& path) {
  std::vector<NamedTensor> tensors;
  for (const auto& [layer, kept] : recurrent(state).layers) {
    const RecurrentState::Shape& shape = kept.states.shape();
    tensors.push_back(named_tensor<float>(fmt::format("layer.{}.state", layer), DType::f32,
                                          {shape.sequences, shape.heads, shape.head_dim, shape.value_dim},
                                          kept.states.layer(0)));
    tensors.push_back(named_tensor<std::int64_t>(fmt::format("layer.{}.tokens", layer), DType::i64, {shape.sequences},
                                                 kept.states.tokens(0)));
    for (const auto& [name, tail] : kept.tails) {
      tensors.push_back(named_tensor<float>(fmt::format("layer.{}.tail.{}", layer, name), DType::f32,
                                            {static_cast<std::int64_t>(tail.size())}, std::span<const float>(tail)));
    }
  }
  write_safetensors(path, tensors, {{"format", std::string(kFormat)}, {"layout", "key-value"}});
}

std::unique_ptr<MethodState> load_recurrent_state(const std::filesystem::path& path) {
  const SafetensorsFile file = SafetensorsFile::open(path);
  const auto format = file.metadata().find("format");
  require(format != file.metadata().end() && format->second == kFormat,
          "{}: metadata 'format' is not '{}'; expected a file of save_recurrent_state()", file.name(), kFormat);
  auto state = std::make_unique<RecurrentMethodState>();
  for (const std::string& name : file.names()) {
    const auto [layer, part] = parts_of(file, name);
    RecurrentMethodState::Layer& kept = state->layers[layer];
    if (part == "state") {
      load_states(file, name, kept.states);
      load_tokens(file, fmt::format("layer.{}.tokens", layer), kept.states);
    } else if (part.starts_with("tail.")) {
      kept.tails[std::string(part.substr(5))] = finite_numbers(file, name);
    } else {
      require(part == "tokens", "{}: unknown tensor '{}'; expected state, tokens or tail.NAME of a layer", file.name(),
              name);
    }
  }
  for (const auto& [layer, kept] : state->layers) {
    require(kept.states.shape().head_dim > 0, "{}: layer {} has no tensor 'layer.{}.state'", file.name(), layer, layer);
  }
  return state;
}

}  // namespace tessera
