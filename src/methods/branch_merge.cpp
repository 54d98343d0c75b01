#include "methods/branch_merge.h"

#include <algorithm>
#include <cmath>

namespace tessera {

void merge_branches(const Branch& a, const Branch& b, const AttentionOutputs& outputs) {
  const std::int64_t rows = outputs.o.shape[2];
  const std::int64_t dim = outputs.o.shape[3];
  for (std::size_t row = 0; row < a.lse.size(); ++row) {
    std::byte* o = outputs.o.row(0, static_cast<std::int64_t>(row) / rows, static_cast<std::int64_t>(row) % rows);
    const float most = std::max(a.lse[row], b.lse[row]);
    const float a_mass = std::exp(a.lse[row] - most);
    const float b_mass = std::exp(b.lse[row] - most);
    const float total = a_mass + b_mass;
    for (std::int64_t d = 0; d < dim; ++d) {
      const std::size_t i = row * static_cast<std::size_t>(dim) + static_cast<std::size_t>(d);
      store_from_float(o, outputs.o.dtype, d, (a_mass * a.o[i] + b_mass * b.o[i]) / total);
    }
    if (!outputs.lse.empty()) outputs.lse[row] = most + std::log(total);
  }
}

}  // namespace tessera
