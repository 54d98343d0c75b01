// RecurrentState: the states of sequences, and their file.
#include <algorithm>
#include <array>
#include <cmath>

#include "core/error.h"
#include "io/safetensors.h"
#include "tessera/recurrent.h"

namespace tessera {

namespace {

constexpr std::int64_t kMostElements = std::int64_t{1} << 31;

/// Product of the sizes; throws Error for one below 1 and a product above 2^31.
std::int64_t elements_of(const RecurrentState::Shape& shape) {
  std::int64_t elements = 1;
  for (const auto& [name, size] : {std::pair{"layers", shape.layers},
                                   {"sequences", shape.sequences},
                                   {"heads", shape.heads},
                                   {"head_dim", shape.head_dim},
                                   {"value_dim", shape.value_dim}}) {
    require(size >= 1 && size <= kMostElements / elements,
            "recurrent state: {} is {}; expected 1 or more, and at most "
            "2^31 elements in all",
            name, size);
    elements *= size;
  }
  return elements;
}

}  // namespace

RecurrentState::RecurrentState(const Shape& shape)
    : shape_(shape),
      values_(static_cast<std::size_t>(elements_of(shape)), 0.0F),
      tokens_(static_cast<std::size_t>(shape.layers * shape.sequences), 0) {}

std::span<const float> RecurrentState::layer(std::int64_t layer) const {
  require(layer >= 0 && layer < shape_.layers && !values_.empty(), "recurrent state: layer is {}; expected 0 to {}",
          layer, shape_.layers - 1);
  const std::size_t size = values_.size() / static_cast<std::size_t>(shape_.layers);
  return std::span(values_).subspan(static_cast<std::size_t>(layer) * size, size);
}

std::span<float> RecurrentState::layer(std::int64_t layer) {
  const std::span<const float> found = std::as_const(*this).layer(layer);
  return {values_.data() + (found.data() - values_.data()), found.size()};
}

std::span<const std::int64_t> RecurrentState::tokens(std::int64_t layer) const {
  require(layer >= 0 && layer < shape_.layers && !tokens_.empty(), "recurrent state: layer is {}; expected 0 to {}",
          layer, shape_.layers - 1);
  const auto size = static_cast<std::size_t>(shape_.sequences);
  return std::span(tokens_).subspan(static_cast<std::size_t>(layer) * size, size);
}

std::span<std::int64_t> RecurrentState::tokens(std::int64_t layer) {
  const std::span<const std::int64_t> found = std::as_const(*this).tokens(layer);
  return {tokens_.data() + (found.data() - tokens_.data()), found.size()};
}

void RecurrentState::reset() {
  std::fill(values_.begin(), values_.end(), 0.0F);
  std::fill(tokens_.begin(), tokens_.end(), 0);
}

void RecurrentState::save(const std::filesystem::path& path) const {
  require(!values_.empty(), "recurrent state: it is empty; expected one with a shape");
  const std::array tensors{
      named_tensor<float>("state", DType::f32,
                          {shape_.layers, shape_.sequences, shape_.heads, shape_.head_dim, shape_.value_dim}, values_),
      named_tensor<std::int64_t>("tokens", DType::i64, {shape_.layers, shape_.sequences}, tokens_)};
  write_safetensors(path, tensors, {{"format", "tessera-recurrent-state"}, {"layout", "key-value"}});
}

RecurrentState RecurrentState::load(const std::filesystem::path& path) {
  const SafetensorsFile file = SafetensorsFile::open(path);
  const auto layout = file.metadata().find("layout");
  require(layout != file.metadata().end() && layout->second == "key-value",
          "{}: metadata 'layout' is not 'key-value'; expected a file of RecurrentState::save", file.name());
  const TensorInfo& info = file.info("state");
  require(info.shape.size() == 5,
          "{}: tensor 'state' has shape [{}]; expected 5 axes: layers, sequences, heads, "
          "head_dim, value_dim",
          file.name(), fmt::join(info.shape, ", "));
  const Shape shape{info.shape[0], info.shape[1], info.shape[2], info.shape[3], info.shape[4]};
  elements_of(shape);
  const TensorInfo& tokens = file.info("tokens");
  const std::vector<std::int64_t> expected{shape.layers, shape.sequences};
  require(tokens.shape == expected, "{}: tensor 'tokens' has shape [{}]; expected [{}]", file.name(),
          fmt::join(tokens.shape, ", "), fmt::join(expected, ", "));
  RecurrentState state;
  state.shape_ = shape;
  state.values_ = file.copy<float>("state");
  state.tokens_ = file.copy<std::int64_t>("tokens");
  require(std::all_of(state.values_.begin(), state.values_.end(), [](float x) { return std::isfinite(x); }),
          "{}: tensor 'state' holds a number that is not finite", file.name());
  require(std::all_of(state.tokens_.begin(), state.tokens_.end(), [](std::int64_t n) { return n >= 0; }),
          "{}: tensor 'tokens' holds a negative number", file.name());
  return state;
}

}  // namespace tessera
