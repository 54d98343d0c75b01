#include "score/gathered_scores.h"

#include <algorithm>
#include <array>

#include "core/convert.h"
#include "core/parallel.h"
#include "score/gathered_levels.h"
#include "score/row_access.h"

namespace tessera::score {

namespace {

constexpr std::int64_t kLanes = 16;
constexpr std::int64_t kRowsAtOnce = 512;
constexpr std::int64_t kKeysAtOnce = 256;

const GatheredLevel& level_of(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx2:
      return gathered_avx2();
    case Isa::avx512:
      return gathered_avx512();
    case Isa::avx512_bf16:
      return gathered_avx512_bf16();
#elif defined(__aarch64__)
    case Isa::neon:
      return gathered_neon();
#endif
    default:
      return gathered_portable();
  }
}

}  // namespace

void QueryPanels::pack(const float* rows, std::int64_t count, std::int64_t dim, bool pairs) {
  panels = (count + kLanes - 1) / kLanes;
  const std::int64_t steps = pairs ? dim / 2 : dim;
  words.resize(static_cast<std::size_t>(panels * steps * kLanes));
  std::vector<std::uint32_t> row(static_cast<std::size_t>(steps));
  for (std::int64_t i = 0; i < panels * kLanes; ++i) {
    // Lanes beyond the last query repeat it: the largest product stays what it is.
    from_float(rows + std::min(i, count - 1) * dim, dim, pairs ? DType::bf16 : DType::f32,
               reinterpret_cast<std::byte*>(row.data()));
    std::uint32_t* to = words.data() + i / kLanes * steps * kLanes + i % kLanes;
    for (std::int64_t w = 0; w < steps; ++w) to[w * kLanes] = row[static_cast<std::size_t>(w)];
  }
}

GatheredKeys::GatheredKeys(const Problem& problem, const AttentionInputs& inputs, std::int64_t sequence,
                           std::int64_t kv_head, std::int64_t count, const RunOptions& options)
    : rows_(kernels::key_rows_of(problem, inputs.k, inputs.pages, sequence, kv_head)), dim_(problem.head_dim) {
  const GatheredLevel& level = level_of(options.isa.value_or(default_isa()));
  const auto aligned = [](std::int64_t bytes) { return bytes % 4 == 0; };
  const bool in_words = dim_ % 2 == 0 && aligned(rows_.row_bytes) && aligned(rows_.page_bytes) &&
                        aligned(static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(rows_.base)));
  pairs_ = level.pairs != nullptr && inputs.q.dtype == DType::bf16 && inputs.k.dtype == DType::bf16 && in_words;
  product_ = pairs_ ? level.pairs : level.floats;
  if (pairs_ || inputs.k.dtype == DType::f32) return;
  converted_.resize(static_cast<std::size_t>(count * dim_));
  parallel_for((count + kRowsAtOnce - 1) / kRowsAtOnce, options.threads, [&](std::int64_t chunk, int) {
    const std::int64_t first = chunk * kRowsAtOnce;
    load_keys(problem, inputs, sequence, kv_head, first, std::min(kRowsAtOnce, count - first),
              converted_.data() + first * dim_);
  });
  rows_ = {};
  rows_.base = reinterpret_cast<const std::byte*>(converted_.data());
  rows_.row_bytes = dim_ * static_cast<std::int64_t>(sizeof(float));
}

void GatheredKeys::largest(const QueryPanels& queries, std::span<const std::int32_t> keys, float* out) const {
  std::array<const std::uint32_t*, static_cast<std::size_t>(kKeysAtOnce)> rows;
  const std::int64_t words = pairs_ ? dim_ / 2 : dim_;
  for (std::size_t first = 0; first < keys.size(); first += rows.size()) {
    const std::size_t count = std::min(rows.size(), keys.size() - first);
    for (std::size_t i = 0; i < count; ++i) {
      rows[i] = reinterpret_cast<const std::uint32_t*>(rows_.row(keys[first + i]));
    }
    product_(rows.data(), static_cast<std::int64_t>(count), queries.words.data(), queries.panels, words, out + first);
  }
}

}  // namespace tessera::score
