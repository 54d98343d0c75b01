#include "kernels/low_bit_scores.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/cpu.h"

namespace tessera::kernels {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kMost = std::numeric_limits<float>::max();
constexpr float kMostNumber = 7;

}  // namespace

bool quantize_to_4_bits(std::span<const float> row, std::int8_t* numbers, float& scale) {
  float most = 0;
  float undefined = 0;
  for (const float x : row) {
    most = std::max(most, std::fabs(x));
    undefined += x - x;  // NaN for NaN and infinity
  }
  scale = most == 0 ? 1.0F : most / kMostNumber;
  if (undefined != 0 || std::isnan(undefined) || scale == 0) {
    scale = 1;
    std::fill_n(numbers, row.size(), std::int8_t{0});
    return undefined == 0;
  }
  // Adding 1.5 * 2^23 rounds to the nearest integer, halves to even.
  constexpr float round = 12582912.0F;
  for (std::size_t d = 0; d < row.size(); ++d) {
    numbers[d] = static_cast<std::int8_t>(static_cast<std::int32_t>(row[d] / scale + round - round));
  }
  return true;
}

LowBitKeyPanels::LowBitKeyPanels(std::int64_t keys, std::int64_t head_dim)
    : head_dim_(head_dim), words_((head_dim + 3) / 4) {
  const std::int64_t groups = (keys + kGroupKeys - 1) / kGroupKeys;
  panels_.resize(static_cast<std::size_t>(groups * words_ * kGroupKeys * 4), kLowBitOffset);
  scale_.resize(static_cast<std::size_t>(groups * kGroupKeys), 1.0F);
  undefined_.resize(scale_.size(), 0);
}

std::vector<float> LowBitKeyPanels::offsets(std::span<const float> per_key) const {
  std::vector<float> all(scale_.size(), -kInfinity);
  for (std::size_t key = 0; key < per_key.size(); ++key) {
    all[key] = undefined_[key] == 0 && std::isfinite(per_key[key]) ? per_key[key] : kInfinity;
  }
  return all;
}

void LowBitKeyPanels::set(std::int64_t first, std::int64_t count, const float* rows) {
  std::vector<std::int8_t> numbers(static_cast<std::size_t>(head_dim_));
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t key = first + i;
    const bool defined = quantize_to_4_bits({rows + i * head_dim_, numbers.size()}, numbers.data(), scale_[key]);
    undefined_[key] = defined ? 0 : 1;
    std::uint8_t* panel = panels_.data() + key / kGroupKeys * words_ * kGroupKeys * 4 + key % kGroupKeys * 4;
    for (std::int64_t d = 0; d < head_dim_; ++d) {
      panel[d / 4 * kGroupKeys * 4 + d % 4] = static_cast<std::uint8_t>(numbers[d] + kLowBitOffset);
    }
  }
}

void LowBitQueryRows::clear() {
  numbers_.clear();
  scale_.clear();
  sum_.clear();
  cut_.clear();
  undefined_.clear();
}

void LowBitQueryRows::add(std::span<const float> row, float factor, float cut) {
  const std::size_t begin = numbers_.size();
  numbers_.resize(begin + static_cast<std::size_t>(words_ * 4), 0);
  float scale = 1;
  const bool defined = quantize_to_4_bits(row, numbers_.data() + begin, scale);
  std::int32_t sum = 0;
  for (std::size_t i = begin; i < numbers_.size(); ++i) sum += numbers_[i];
  scale_.push_back(scale * factor);
  sum_.push_back(sum);
  undefined_.push_back(defined ? 0 : 1);
  cut_.push_back(0);
  set_cut(static_cast<std::int64_t>(cut_.size()) - 1, cut);
}

void LowBitQueryRows::set_cut(std::int64_t row, float cut) {
  // Finite numbers only, so that the kernel never subtracts infinities.
  cut_[row] = undefined_[row] != 0 || !(cut < kInfinity) ? -kMost : std::max(cut, -kMost);
}

void low_bit_excess(const LowBitQueryRows& queries, const LowBitKeyPanels& keys, std::span<const float> offsets,
                    std::int64_t first_group, std::span<float> excess, Isa isa) {
  level_of(isa).low_bit_excess(queries.view(), keys.view(offsets), first_group,
                               static_cast<std::int64_t>(excess.size()), excess.data());
}

}  // namespace tessera::kernels
