#include "methods/branch_merge.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/convert.h"
#include "core/parallel.h"

namespace tessera {

void merge_branches(const Branch& a, const Branch& b, const AttentionOutputs& outputs, int threads) {
  constexpr std::int64_t rows_at_once = 32;
  constexpr float nothing = -std::numeric_limits<float>::infinity();
  const std::int64_t heads = outputs.o.shape[1];
  const std::int64_t queries = outputs.o.shape[2];
  const std::int64_t dim = outputs.o.shape[3];
  const auto rows = static_cast<std::int64_t>(a.lse.size());
  parallel_for((rows + rows_at_once - 1) / rows_at_once, threads, [&](std::int64_t chunk, int) {
    std::vector<float> joined(static_cast<std::size_t>(dim));
    for (std::int64_t row = chunk * rows_at_once; row < std::min((chunk + 1) * rows_at_once, rows); ++row) {
      const float most = std::max(a.lse[row], b.lse[row]);
      const bool empty = most == nothing;
      const float a_mass = empty ? 0.0F : std::exp(a.lse[row] - most);
      const float b_mass = empty ? 0.0F : std::exp(b.lse[row] - most);
      const float total = a_mass + b_mass;
      const float inverse = empty ? 0.0F : 1 / total;
      const float* of_a = a.o.data() + row * dim;
      const float* of_b = b.o.data() + row * dim;
      for (std::int64_t d = 0; d < dim; ++d) joined[d] = (a_mass * of_a[d] + b_mass * of_b[d]) * inverse;
      std::byte* o = outputs.o.row(row / queries / heads, row / queries % heads, row % queries);
      from_float(joined.data(), dim, outputs.o.dtype, o);
      if (!outputs.lse.empty()) outputs.lse[row] = empty ? nothing : most + std::log(total);
    }
  });
}

}  // namespace tessera
