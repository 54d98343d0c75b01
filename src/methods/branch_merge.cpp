#include "methods/branch_merge.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/convert.h"
#include "core/parallel.h"

namespace tessera {

void merge_row(float lse, const float* o, std::int64_t value_dim, float& into_lse, float* into_o) {
  if (lse == -std::numeric_limits<float>::infinity()) return;
  if (into_lse == -std::numeric_limits<float>::infinity()) {
    into_lse = lse;
    std::copy_n(o, value_dim, into_o);
    return;
  }
  const float most = std::max(into_lse, lse);
  const float old_mass = std::exp(into_lse - most);
  const float new_mass = std::exp(lse - most);
  const float total = old_mass + new_mass;
  for (std::int64_t d = 0; d < value_dim; ++d) into_o[d] = (old_mass * into_o[d] + new_mass * o[d]) / total;
  into_lse = most + std::log(total);
}

void merge_branches(const Branch& a, const Branch& b, const AttentionOutputs& outputs, int threads) {
  constexpr std::int64_t rows_at_once = 32;
  const std::int64_t heads = outputs.o.shape[1];
  const std::int64_t queries = outputs.o.shape[2];
  const std::int64_t dim = outputs.o.shape[3];
  const std::int64_t rows = std::ssize(a.lse);
  parallel_for((rows + rows_at_once - 1) / rows_at_once, threads, [&](std::int64_t chunk, int) {
    std::vector<float> joined(static_cast<std::size_t>(dim));
    for (std::int64_t row = chunk * rows_at_once; row < std::min((chunk + 1) * rows_at_once, rows); ++row) {
      float lse = -std::numeric_limits<float>::infinity();
      std::fill(joined.begin(), joined.end(), 0.0F);
      for (const Branch* branch : {&a, &b}) {
        merge_row(branch->lse[static_cast<std::size_t>(row)], branch->o.data() + row * dim, dim, lse, joined.data());
      }
      std::byte* o = outputs.o.row(row / queries / heads, row / queries % heads, row % queries);
      from_float(joined.data(), dim, outputs.o.dtype, o);
      if (!outputs.lse.empty()) outputs.lse[static_cast<std::size_t>(row)] = lse;
    }
  });
}

}  // namespace tessera
