#include "score/delta_keys.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "score/gathered_levels.h"

namespace tessera::score {

namespace {

const DeltaLevel& level_of(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx2:
      return delta_avx2();
    case Isa::avx512:
    case Isa::avx512_bf16:
      return delta_avx512();
#elif defined(__aarch64__)
    case Isa::neon:
      return delta_neon();
#endif
    default:
      return delta_portable();
  }
}

}  // namespace

bool DeltaKeys::moves(const float* row, std::int64_t channel) const {
  const auto change = [&](std::int64_t c) { return std::fabs(row[c] - held_[c]); };
  if (change(channel) <= theta_) return false;  // NaN moves
  if (rule_ == DeltaRule::channel) return true;
  // Of four neighbours two may move; equal changes go to the earlier channel.
  int before = 0;
  const std::int64_t first = channel / 4 * 4;
  for (std::int64_t c = first; c < std::min(first + 4, dim_); ++c) {
    if (change(c) > change(channel) || (change(c) == change(channel) && c < channel)) ++before;
  }
  return before < 2;
}

void DeltaKeys::append(const float* rows, std::int64_t count) {
  std::vector<std::uint8_t> moving(static_cast<std::size_t>(dim_));
  for (std::int64_t n = 0; n < count; ++n, rows += dim_) {
    const bool first = keys_ == 0;
    if (first) held_.assign(static_cast<std::size_t>(dim_), 0.0F);
    if (keys_ % kDeltaPanel == 0) {
      panel_begin_.push_back(values_.size());
      panel_held_.insert(panel_held_.end(), held_.begin(), held_.end());
    }
    if (first) {
      std::fill(moving.begin(), moving.end(), std::uint8_t{1});
    } else if (rule_ == DeltaRule::row) {
      float square = 0;
      for (std::int64_t c = 0; c < dim_; ++c) square += (rows[c] - held_[c]) * (rows[c] - held_[c]);
      std::fill(moving.begin(), moving.end(), static_cast<std::uint8_t>(std::sqrt(square) <= theta_ ? 0 : 1));
    } else if (rule_ == DeltaRule::channel) {
      for (std::int64_t c = 0; c < dim_; ++c) moving[c] = std::fabs(rows[c] - held_[c]) <= theta_ ? 0 : 1;
    } else {
      for (std::int64_t c = 0; c < dim_; ++c) moving[c] = moves(rows, c) ? 1 : 0;
    }
    for (std::int64_t w = 0; w < words(); ++w) {
      std::uint64_t bits = 0;
      for (std::int64_t c = w * 64; c < std::min(dim_, (w + 1) * 64); ++c) {
        if (moving[c] == 0) continue;
        bits |= std::uint64_t{1} << (c % 64);
        values_.push_back(rows[c]);
        held_[c] = rows[c];
      }
      bits_.push_back(bits);
    }
    ++keys_;
  }
}

void DeltaKeys::expand(std::int64_t first, std::int64_t count, float* out) const {
  for (std::int64_t panel = first / kDeltaPanel; panel * kDeltaPanel < first + count; ++panel) {
    std::vector<float> held(panel_held_.begin() + panel * dim_, panel_held_.begin() + (panel + 1) * dim_);
    const float* next = values_.data() + panel_begin_[panel];
    for (std::int64_t n = panel * kDeltaPanel; n < std::min({(panel + 1) * kDeltaPanel, keys_, first + count}); ++n) {
      for (std::int64_t w = 0; w < words(); ++w) {
        for (std::uint64_t bits = bits_[n * words() + w]; bits != 0; bits &= bits - 1) {
          held[w * 64 + std::countr_zero(bits)] = *next++;
        }
      }
      if (n >= first) std::copy(held.begin(), held.end(), out + (n - first) * dim_);
    }
  }
}

std::int64_t DeltaKeys::truncate(std::int64_t count) {
  if (count >= keys_) return keys_;
  const std::int64_t panel = count / kDeltaPanel;
  held_.assign(panel_held_.begin() + panel * dim_, panel_held_.begin() + (panel + 1) * dim_);
  keys_ = panel * kDeltaPanel;
  bits_.resize(static_cast<std::size_t>(keys_ * words()));
  values_.resize(panel_begin_[panel]);
  panel_begin_.resize(static_cast<std::size_t>(panel));
  panel_held_.resize(static_cast<std::size_t>(panel * dim_));
  return keys_;
}

std::size_t DeltaKeys::memory_bytes() const {
  return bits_.capacity() * sizeof(std::uint64_t) + panel_begin_.capacity() * sizeof(std::size_t) +
         (values_.capacity() + panel_held_.capacity() + held_.capacity()) * sizeof(float);
}

std::int64_t DeltaKeys::panel_scores(std::int64_t panel, const float* queries, std::int64_t rows, Isa isa,
                                     std::vector<float>& held, float* scores) const {
  const std::int64_t first = panel * kDeltaPanel;
  const DeltaSpan span{bits_.data() + first * words(), values_.data() + panel_begin_[panel],
                       std::min(kDeltaPanel, keys_ - first), words(), dim_};
  held.assign(panel_held_.begin() + panel * dim_, panel_held_.begin() + (panel + 1) * dim_);
  const DeltaLevel& level = level_of(isa);
  (rows == 16 ? level.rows_16 : level.rows_64)(span, queries, held.data(), scores);
  return span.keys;
}

}  // namespace tessera::score
