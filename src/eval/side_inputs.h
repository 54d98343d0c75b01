// Random tensors for what methods read beside q, k, v, so that they can be measured without a model.
#pragma once

#include <cstdint>
#include <deque>
#include <span>
#include <string>
#include <vector>

#include "tessera/method.h"

namespace tessera::eval {

/// Owns the tensors.
class RandomSideInputs {
 public:
  /// The required side inputs of the method and those of its optional ones that are named, uniform in the range that it
  /// declares. Throws Error for a name that the method does not declare.
  RandomSideInputs(const MethodInfo& info, const Problem& problem, std::uint64_t seed,
                   std::span<const std::string> optional = {});

  /// Those that the inputs do not hold yet are added.
  void add_to(AttentionInputs& inputs) const;

 private:
  std::deque<std::vector<float>> values_;
  std::vector<SideTensor> tensors_;
};

}  // namespace tessera::eval
