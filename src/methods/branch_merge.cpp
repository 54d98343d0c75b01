#include "methods/branch_merge.h"

#include <algorithm>
#include <cmath>

#include "core/convert.h"
#include "core/parallel.h"

namespace tessera {

namespace {

constexpr std::int64_t kRowsPerItem = 32;

}  // namespace

void merge_branches(const Branch& a, const Branch& b, const AttentionOutputs& outputs, int threads) {
  const std::int64_t rows = outputs.o.shape[2];
  const std::int64_t dim = outputs.o.shape[3];
  const auto merge_row = [&](std::int64_t row, float* joined) {
    const float a_lse = a.lse[static_cast<std::size_t>(row)];
    const float b_lse = b.lse[static_cast<std::size_t>(row)];
    const float most = std::max(a_lse, b_lse);
    const float a_mass = std::exp(a_lse - most);
    const float b_mass = std::exp(b_lse - most);
    const float total = a_mass + b_mass;
    const float a_share = a_mass / total;
    const float b_share = b_mass / total;
    const float* a_row = a.o.data() + row * dim;
    const float* b_row = b.o.data() + row * dim;
    for (std::int64_t d = 0; d < dim; ++d) joined[d] = a_share * a_row[d] + b_share * b_row[d];
    from_float(joined, dim, outputs.o.dtype, outputs.o.row(0, row / rows, row % rows));
    if (!outputs.lse.empty()) outputs.lse[static_cast<std::size_t>(row)] = most + std::log(total);
  };
  const std::int64_t count = std::ssize(a.lse);
  parallel_for((count + kRowsPerItem - 1) / kRowsPerItem, threads, [&](std::int64_t item, int) {
    std::vector<float> joined(static_cast<std::size_t>(dim));
    const std::int64_t end = std::min(count, (item + 1) * kRowsPerItem);
    for (std::int64_t row = item * kRowsPerItem; row < end; ++row) merge_row(row, joined.data());
  });
}

}  // namespace tessera
