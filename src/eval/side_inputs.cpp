#include "eval/side_inputs.h"

#include <array>
#include <random>

namespace tessera::eval {

RandomSideInputs::RandomSideInputs(const MethodInfo& info, const Problem& problem, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  for (const SideInputInfo& side : info.side) {
    if (!side.required) continue;
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
