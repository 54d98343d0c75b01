// The attention problem: derived sizes and validation.
#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <vector>

#include "core/error.h"
#include "tessera/core.h"

namespace tessera {

float Problem::softmax_scale() const {
  return scale.value_or(1.0F / std::sqrt(static_cast<float>(head_dim)));
}
std::int64_t Problem::q_len_of(std::int64_t sequence) const {
  return variable_length() ? cu_seqlens_q[sequence + 1] - cu_seqlens_q[sequence] : q_len;
}
std::int64_t Problem::kv_len_of(std::int64_t sequence) const {
  return variable_length() ? cu_seqlens_k[sequence + 1] - cu_seqlens_k[sequence] : kv_len;
}
std::int64_t Problem::q_begin_of(std::int64_t sequence) const {
  return variable_length() ? cu_seqlens_q[sequence] : 0;
}
std::int64_t Problem::kv_begin_of(std::int64_t sequence) const {
  return variable_length() ? cu_seqlens_k[sequence] : 0;
}
std::int64_t Problem::q_offset_of(std::int64_t sequence) const {
  return q_offset.value_or(kv_len_of(sequence) - q_len_of(sequence));
}

TokenGrid Problem::grid_of(std::int64_t sequence) const {
  return grid.value_or(TokenGrid{.extent = {1, 1, kv_len_of(sequence)}});
}

std::int64_t Problem::allowed_pairs() const {
  std::int64_t pairs = 0;
  for (std::int64_t s = 0; s < batch; ++s) {
    const std::int64_t queries = q_len_of(s);
    const std::int64_t keys = kv_len_of(s);
    if (!causal) {
      pairs += queries * keys;
      continue;
    }
    // Row r sees clamp(offset + r + 1, 0, keys) keys: a ramp between rows `first` and `full`.
    const std::int64_t offset = q_offset_of(s);
    const std::int64_t first = std::clamp(-offset, std::int64_t{0}, queries);
    const std::int64_t full = std::clamp(keys - offset - 1, first, queries);
    const std::int64_t ramp = full - first;
    pairs += ramp * (offset + first + 1) + ramp * (ramp - 1) / 2 + (queries - full) * keys;
  }
  return pairs;
}

namespace {

void check_cu_seqlens(const std::vector<std::int64_t>& bounds, std::string_view name, std::int64_t batch,
                      std::int64_t total) {
  require(static_cast<std::int64_t>(bounds.size()) == batch + 1, "{} has {} entries; batch {} needs {}", name,
          bounds.size(), batch, batch + 1);
  require(bounds.front() == 0, "{}[0] is {}; expected 0", name, bounds.front());
  require(std::is_sorted(bounds.begin(), bounds.end()), "{} decreases; expected ascending offsets", name);
  require(bounds.back() == total, "{} ends at {}; the tensor has {} tokens", name, bounds.back(), total);
}

void check_size(std::int64_t value, std::string_view name, std::int64_t minimum) {
  // 2^31 - 1: token indices are 32-bit in plans.
  constexpr std::int64_t maximum = std::numeric_limits<std::int32_t>::max();
  require(value >= minimum && value <= maximum, "{} is {}; expected {} to {}", name, value, minimum, maximum);
}

void check_grid(const Problem& problem) {
  const TokenGrid& grid = *problem.grid;
  const auto [frames, rows, columns] = grid.extent;
  check_size(frames, "grid frames", 1);
  check_size(rows, "grid rows", 1);
  check_size(columns, "grid columns", 1);
  check_size(grid.prefix, "grid prefix", 0);
  check_size(grid.suffix, "grid suffix", 0);
  for (std::int64_t s = 0; s < problem.batch; ++s) {
    const std::int64_t keys = problem.kv_len_of(s);
    // Divided step by step: the product may not fit 64 bits.
    const std::int64_t cells = keys - grid.prefix - grid.suffix;
    const bool fits =
        cells > 0 && cells % columns == 0 && cells / columns % rows == 0 && cells / columns / rows == frames;
    require(fits, "grid is {}x{}x{} with {} + {} text tokens; the {} keys of sequence {} do not fit it", frames, rows,
            columns, grid.prefix, grid.suffix, keys, s);
    const std::int64_t first = problem.q_offset_of(s);
    require(first >= 0 && first + problem.q_len_of(s) <= keys,
            "queries {} to {} of sequence {} lie outside its grid of {} tokens; expected q_offset and q_len inside it",
            first, first + problem.q_len_of(s) - 1, s, keys);
  }
}

}  // namespace

TokenGrid grid_from_text(std::string_view text) {
  std::vector<std::int64_t> extents;
  const char* next = text.data();
  const char* const end = text.data() + text.size();
  while (true) {
    std::int64_t value = 0;
    const auto [rest, failed] = std::from_chars(next, end, value);
    const bool number = failed == std::errc{} && value >= 1;
    require(number && extents.size() < 3 && (rest == end || *rest == 'x'),
            "grid is '{}'; expected W, HxW or TxHxW with positive numbers", text);
    extents.push_back(value);
    if (rest == end) break;
    next = rest + 1;
  }
  TokenGrid grid;
  std::copy(extents.begin(), extents.end(), grid.extent.end() - static_cast<std::ptrdiff_t>(extents.size()));
  return grid;
}

void Problem::validate() const {
  check_size(batch, "batch", 1);
  check_size(q_heads, "q_heads", 1);
  check_size(kv_heads, "kv_heads", 1);
  check_size(q_len, "q_len", 0);
  check_size(kv_len, "kv_len", 0);
  check_size(head_dim, "head_dim", 1);
  check_size(value_dim, "value_dim", 1);
  require(head_dim <= 1024 && value_dim <= 1024, "head_dim {} or value_dim {} is too large; expected at most 1024",
          head_dim, value_dim);
  require(q_heads % kv_heads == 0, "q_heads {} is not a multiple of kv_heads {}", q_heads, kv_heads);
  require(!scale || std::isfinite(*scale), "scale is {}; expected a finite number", scale.value_or(0));
  require(cu_seqlens_q.empty() == cu_seqlens_k.empty(), "cu_seqlens_q and cu_seqlens_k must be given together");
  if (variable_length()) {
    check_cu_seqlens(cu_seqlens_q, "cu_seqlens_q", batch, q_len);
    check_cu_seqlens(cu_seqlens_k, "cu_seqlens_k", batch, kv_len);
  }
  if (q_offset) {
    require(*q_offset > std::numeric_limits<std::int32_t>::min() / 2 &&
                *q_offset < std::numeric_limits<std::int32_t>::max() / 2,
            "q_offset is {}; expected a 31-bit position", *q_offset);
  }
  if (grid) check_grid(*this);
}

Problem problem_of(const TensorView& q, const TensorView& k, const TensorView& v, bool causal) {
  require(q.batch() == k.batch() && k.batch() == v.batch(), "batch sizes differ: q {}, k {}, v {}", q.batch(),
          k.batch(), v.batch());
  require(k.heads() == v.heads(), "k has {} heads, v has {}; expected the same", k.heads(), v.heads());
  require(k.tokens() == v.tokens(), "k has {} tokens, v has {}; expected the same", k.tokens(), v.tokens());
  require(q.dim() == k.dim(), "head_dim differs: q {}, k {}", q.dim(), k.dim());
  Problem problem;
  problem.batch = q.batch();
  problem.q_heads = q.heads();
  problem.kv_heads = k.heads();
  problem.q_len = q.tokens();
  problem.kv_len = k.tokens();
  problem.head_dim = q.dim();
  problem.value_dim = v.dim();
  problem.causal = causal;
  problem.validate();
  return problem;
}

}  // namespace tessera
