// Scores estimated from queries and keys of 4 bits, for selections that need no more than "is any of them high enough".
//
// SALE (arXiv 2505.24179): signed numbers in -7..7 with one scale per token, keys relative to their mean; what the mean
// query adds to the score of a key comes back as an exact offset per key.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/cpu/tile.h"
#include "tessera/attention.h"

namespace tessera::kernels {

/// x = scale * number for the numbers of one row, numbers rounded to the nearest in -7..7, halves to even. A row of
/// zeros has scale 1. False, and numbers 0, where the row holds NaN or Inf.
bool quantize_to_4_bits(std::span<const float> row, std::int8_t* numbers, float& scale);

/// Keys of one head in panels of 16.
class LowBitKeyPanels {
 public:
  LowBitKeyPanels(std::int64_t keys, std::int64_t head_dim);
  /// Keys [first, first + count) from [count][head_dim] rows. Calls for different groups may run at the same time.
  void set(std::int64_t first, std::int64_t count, const float* rows);
  /// What is added to the estimates of each key, in the layout that low_bit_excess reads. A key that holds NaN or Inf,
  /// or whose offset does, is estimated at infinity.
  std::vector<float> offsets(std::span<const float> per_key) const;
  LowBitKeys view(std::span<const float> offsets) const { return {panels_.data(), scale_.data(), offsets.data()}; }

 private:
  std::int64_t head_dim_;
  std::int64_t words_;
  std::vector<std::uint8_t> panels_;
  std::vector<float> scale_;
  std::vector<std::uint8_t> undefined_;
};

/// Query rows of a tile, with the score that the estimate has to exceed.
class LowBitQueryRows {
 public:
  explicit LowBitQueryRows(std::int64_t head_dim) : words_((head_dim + 3) / 4) {}
  void clear();
  /// Adds a row whose products count `factor` each. One that holds NaN or Inf, or whose cut is NaN or infinity, exceeds
  /// everywhere.
  void add(std::span<const float> row, float factor, float cut);
  void set_cut(std::int64_t row, float cut);
  LowBitQueries view() const {
    return {static_cast<std::int64_t>(scale_.size()), words_, numbers_.data(), scale_.data(), sum_.data(), cut_.data()};
  }

 private:
  std::int64_t words_;
  std::vector<std::int8_t> numbers_;
  std::vector<float> scale_;
  std::vector<std::int32_t> sum_;
  std::vector<float> cut_;
  std::vector<std::uint8_t> undefined_;
};

/// excess[g] = largest (estimate - cut of the row) over all rows and the 16 keys of group first_group + g.
/// `offsets` come from LowBitKeyPanels::offsets.
void low_bit_excess(const LowBitQueryRows& queries, const LowBitKeyPanels& keys, std::span<const float> offsets,
                    std::int64_t first_group, std::span<float> excess, Isa isa);

}  // namespace tessera::kernels
