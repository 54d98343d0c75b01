// Keys or values of one layer in a few bits each: what KIVI (arXiv:2402.02750), ZipCache (arXiv:2405.14256) and others
// that quantise share. A number is (code * step + minimum), times a factor of its channel where there are such.
//
// Codes lie as a product walks them. 64 tokens make a block, whose codes are contiguous. The lanes of a product are the
// tokens for keys and the channels for values; the depth is the other one. 16 lanes make a cell, a list of granules:
// 16 words for each of `granule_words`, word i for lane i. Byte b of a word holds the codes of depths 4 s + b, one
// above the other, so that a shift and a mask give four codes to a product of bytes. Codes of 3 bits lie as two words
// of 2 low bits and one of the high bit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "tessera/core.h"

namespace tessera {

constexpr std::int64_t kQuantizedBlock = 64;  ///< tokens
constexpr std::int64_t kQuantizedCell = 16;   ///< lanes
/// Arrays of scales and factors are filled up to a multiple of this.
constexpr std::int64_t kQuantizedPadding = 64;

/// Which numbers have their step and their minimum in common.
enum class QuantizedScales : std::uint8_t {
  channel,         ///< of one channel, over a group of consecutive tokens
  token,           ///< of one token, over a group of consecutive channels of the head
  token_of_layer,  ///< of one token, over all channels of all heads
};

struct QuantizedFormat {
  int bits = 4;  ///< 2, 3, 4 or 8
  QuantizedScales scales = QuantizedScales::channel;
  /// Tokens or channels that share a scale, a multiple of 32; 0: all tokens of an append(), or all channels. Grouped
  /// are channel scales of keys and token scales of values, the usual ones.
  std::int64_t group = 0;
  /// Token scales only: numbers are first divided by sqrt(max |x|) of their channel (channel-separable quantisation).
  bool channel_factors = false;
  DType scale_dtype = DType::f32;  ///< of steps and minima; f32, bf16 or f16
};

enum class QuantizedSide : std::uint8_t { keys, values };

/// Depths that a granule holds, and words of each of its lanes.
constexpr std::int64_t granule_depth(int bits) {
  return bits == 3 ? 32 : 32 / bits;
}
constexpr std::int64_t granule_words(int bits) {
  return bits == 3 ? 3 : 1;
}

/// A block of 64 tokens, or fewer at the end, as kernels read it.
struct QuantizedBlock {
  const std::uint32_t* codes = nullptr;
  std::int64_t tokens = 0;
  std::int64_t cells = 0;
  std::int64_t granules = 0;    ///< of a cell
  std::int64_t cell_words = 0;  ///< from one cell to the next
};

/// Tokens that were appended together, of one head.
struct QuantizedTiles {
  QuantizedSide side = QuantizedSide::keys;
  QuantizedFormat format;
  std::int64_t dim = 0;
  std::int64_t tokens = 0;
  const std::uint32_t* codes = nullptr;
  /// Scales along the depth: [lane group][scale_count]; along the lanes: [scale_count]. Filled up with zeros.
  const std::byte* steps = nullptr;
  const std::byte* minima = nullptr;
  std::int64_t scale_count = 0;
  const float* factors = nullptr;  ///< [dim filled up with ones]; null: none

  std::int64_t blocks() const { return (tokens + kQuantizedBlock - 1) / kQuantizedBlock; }
  QuantizedBlock block(std::int64_t index) const;
  /// Whether scales belong to depths; else to lanes.
  bool scales_along_depth() const {
    return (side == QuantizedSide::keys) == (format.scales == QuantizedScales::channel);
  }
  /// Lanes that share the scales of a depth.
  std::int64_t lanes_per_group() const { return format.group > 0 ? format.group : INT64_MAX; }
};

/// Keys or values of all kv heads of a layer.
class QuantizedStore {
 public:
  /// Writes row `token` of head `head` as `dim` floats; called from several threads, each row several times.
  using ReadRow = std::function<void(std::int64_t head, std::int64_t token, float* row)>;

  using ChannelFactors = std::vector<std::vector<float>>;  ///< [heads][channels filled up with ones]

  /// Throws Error for bits, groups or dtypes other than QuantizedFormat says.
  QuantizedStore(QuantizedSide side, std::int64_t heads, std::int64_t dim, const QuantizedFormat& format);

  /// Quantises `tokens` rows per head, which get scales of their own. |x - stored x| <= step / 2 * factor up to the
  /// rounding of floats. A scale over a number that is not finite has NaN as its minimum, and so have all that share
  /// it.
  /// `factors` are those of find_factors() over these rows and perhaps others; empty: over these alone.
  void append(std::int64_t tokens, const ReadRow& read, int threads, const ChannelFactors& factors = {});
  /// sqrt(max |x|) of every channel over `tokens` rows, 1 where all are 0; numbers that are not finite do not count.
  ChannelFactors find_factors(std::int64_t tokens, const ReadRow& read, int threads) const;
  /// What append() call `batch` left of a head: rows [tokens][dim].
  std::vector<float> expand(std::int64_t head, std::size_t batch) const;

  std::size_t batches() const { return batches_.size(); }
  QuantizedTiles tiles(std::int64_t head, std::size_t batch) const;
  std::int64_t tokens() const { return tokens_; }
  std::size_t memory_bytes() const;
  void clear();

 private:
  struct Batch {
    std::int64_t tokens = 0;
    std::vector<std::vector<std::uint32_t>> codes;  ///< [heads]
    std::vector<std::vector<std::byte>> steps;      ///< [heads], or one for all
    std::vector<std::vector<std::byte>> minima;
    ChannelFactors factors;  ///< empty: none
  };

  void find_scales(Batch& batch, std::int64_t head, const ReadRow& read) const;
  void find_scales_of_layer(Batch& batch, const ReadRow& read, int threads) const;
  void encode(Batch& batch, std::int64_t head, const ReadRow& read) const;
  void divide_by_factors(const Batch& batch, std::int64_t head, float* row) const;
  QuantizedTiles tiles_of(const Batch& batch, std::int64_t head) const;
  /// Place of the scale of a number among those of its head.
  std::int64_t scale_of(const QuantizedTiles& tiles, std::int64_t token, std::int64_t channel) const;

  QuantizedSide side_;
  std::int64_t heads_;
  std::int64_t dim_;
  QuantizedFormat format_;
  std::vector<Batch> batches_;
  std::int64_t tokens_ = 0;
};

}  // namespace tessera
