#include "eval/side_inputs.h"

#include <algorithm>
#include <array>
#include <random>

#include "core/error.h"

namespace tessera::eval {

RandomSideInputs::RandomSideInputs(const MethodInfo& info, const Problem& problem, std::uint64_t seed,
                                   std::span<const std::string> optional) {
  for (const std::string& name : optional) {
    std::vector<std::string_view> known;
    for (const SideInputInfo& side : info.side) known.push_back(side.name);
    require(std::find(known.begin(), known.end(), name) != known.end(), "{}: there is no side input '{}'; expected {}",
            info.name, name, known.empty() ? "none" : fmt::format("one of {}", fmt::join(known, ", ")));
  }
  std::mt19937_64 random(seed);
  for (const SideInputInfo& side : info.side) {
    if (!side.required && std::find(optional.begin(), optional.end(), side.name) == optional.end()) continue;
    const std::array<std::int64_t, 4> shape = side_shape(side, problem);
    std::vector<float>& values = values_.emplace_back();
    values.resize(static_cast<std::size_t>(shape[0] * shape[1] * shape[2] * shape[3]));
    std::uniform_real_distribution<float> uniform(static_cast<float>(side.minimum), static_cast<float>(side.maximum));
    for (float& x : values) x = uniform(random);
    tensors_.push_back({side.name, view_of(values.data(), DType::f32, shape)});
  }
}

void RandomSideInputs::add_to(AttentionInputs& inputs) const {
  for (const SideTensor& tensor : tensors_) {
    if (inputs.find_side(tensor.name) == nullptr) inputs.side.push_back(tensor);
  }
}

}  // namespace tessera::eval
