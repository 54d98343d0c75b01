#include "cache/quantized_store.h"

#include <algorithm>
#include <array>
#include <cassert>
#include <cmath>
#include <limits>

#include "core/error.h"
#include "core/parallel.h"

namespace tessera {

namespace {

constexpr std::int64_t kTokensPerItem = 256;
constexpr float kUndefined = std::numeric_limits<float>::quiet_NaN();

std::int64_t divide_up(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}
std::int64_t fill_up(std::int64_t count) {
  return divide_up(count, kQuantizedPadding) * kQuantizedPadding;
}

/// The nearest number of a dtype that is not below x, or not above it.
float round_outward(float x, DType dtype, bool up) {
  if (dtype == DType::f32) return x;
  const bool bf16 = dtype == DType::bf16;
  const auto value = [&](std::uint16_t bits) { return bf16 ? bf16_to_float(bits) : f16_to_float(bits); };
  const std::uint16_t bits = bf16 ? float_to_bf16(x) : float_to_f16(x);
  const float rounded = value(bits);
  if (!std::isfinite(rounded) || (up ? rounded >= x : rounded <= x)) return rounded;
  // The neighbour: away from 0 where that is the direction.
  if ((bits & 0x7fffU) == 0) return value(up ? 0x0001U : 0x8001U);
  const bool away = (rounded > 0) == up;
  return value(static_cast<std::uint16_t>(away ? bits + 1 : bits - 1));
}

/// Smallest and largest of the numbers that share a scale.
struct Range {
  float low = std::numeric_limits<float>::infinity();
  float high = -std::numeric_limits<float>::infinity();
  bool finite = true;

  void add(float x) {
    finite = finite && std::isfinite(x);
    low = std::min(low, x);
    high = std::max(high, x);
  }
};

void store_scale(const Range& range, int bits, DType dtype, std::int64_t place, std::byte* steps, std::byte* minima) {
  float step = 0;
  float minimum = kUndefined;
  if (range.finite) {
    const auto levels = static_cast<float>((1 << bits) - 1);
    minimum = round_outward(range.low, dtype, false);
    // Divided first: the range of large numbers may be infinite.
    const float exact = range.high == minimum ? 0.0F : range.high / levels - minimum / levels;
    step = round_outward(exact, dtype, true);
  }
  store_from_float(steps, dtype, place, step);
  store_from_float(minima, dtype, place, minimum);
}

std::uint32_t code_of(float x, float step, float minimum, int bits) {
  const auto levels = static_cast<float>((1 << bits) - 1);
  if (!(step > 0)) return 0;
  const float y = (x - minimum) / step + 0.5F;
  if (!(y > 0)) return 0;
  return static_cast<std::uint32_t>(std::min(y, levels + 0.5F));
}

/// Where the code of a depth lies in its granule: word and shift; of 3 bits the two low ones and the high one.
struct CodePlace {
  std::int64_t word;
  unsigned shift;
  unsigned high_shift;
};
CodePlace place_of(int bits, std::int64_t depth) {
  const std::int64_t inside = depth % granule_depth(bits);
  const auto byte = static_cast<unsigned>(inside % 4) * 8;
  const auto step = static_cast<unsigned>(inside / 4);
  if (bits != 3) return {0, byte + step * static_cast<unsigned>(bits), 0};
  return {inside / 16, byte + step % 4 * 2, byte + step};
}

void put(std::uint32_t* lane, const CodePlace& place, int bits, std::uint32_t code) {
  if (bits != 3) {
    *lane |= code << place.shift;
    return;
  }
  lane[place.word * kQuantizedCell] |= (code & 3U) << place.shift;
  lane[2 * kQuantizedCell] |= (code >> 2) << place.high_shift;
}

std::uint32_t get(const std::uint32_t* lane, const CodePlace& place, int bits) {
  if (bits != 3) return *lane >> place.shift & ((1U << bits) - 1);
  return (lane[place.word * kQuantizedCell] >> place.shift & 3U) | (lane[2 * kQuantizedCell] >> place.high_shift & 1U)
                                                                       << 2;
}

/// Word of the lane of (token, channel) at the granule of its depth, from the beginning of the codes.
std::int64_t lane_word(const QuantizedTiles& tiles, const QuantizedBlock& block, std::int64_t token,
                       std::int64_t channel) {
  const bool keys = tiles.side == QuantizedSide::keys;
  const std::int64_t in_block = token % kQuantizedBlock;
  const std::int64_t lane = keys ? in_block : channel;
  const std::int64_t depth = keys ? channel : in_block;
  const int bits = tiles.format.bits;
  return block.codes - tiles.codes + lane / kQuantizedCell * block.cell_words +
         depth / granule_depth(bits) * granule_words(bits) * kQuantizedCell + lane % kQuantizedCell;
}

}  // namespace

QuantizedBlock QuantizedTiles::block(std::int64_t index) const {
  const std::int64_t granule = granule_words(format.bits) * kQuantizedCell;
  const bool keys = side == QuantizedSide::keys;
  const auto cells_of = [&](std::int64_t count) { return divide_up(keys ? count : dim, kQuantizedCell); };
  const auto granules_of = [&](std::int64_t count) {
    return divide_up(keys ? dim : count, granule_depth(format.bits));
  };
  QuantizedBlock block;
  block.codes = codes + index * cells_of(kQuantizedBlock) * granules_of(kQuantizedBlock) * granule;
  block.tokens = std::min(kQuantizedBlock, tokens - index * kQuantizedBlock);
  block.cells = cells_of(block.tokens);
  block.granules = granules_of(block.tokens);
  block.cell_words = block.granules * granule;
  return block;
}

QuantizedStore::QuantizedStore(QuantizedSide side, std::int64_t heads, std::int64_t dim, const QuantizedFormat& format)
    : side_(side), heads_(heads), dim_(dim), format_(format) {
  require(format.bits == 2 || format.bits == 3 || format.bits == 4 || format.bits == 8,
          "quantized store: bits={}; expected 2, 3, 4 or 8", format.bits);
  require(format.group >= 0 && format.group % 32 == 0, "quantized store: group={}; expected a multiple of 32, or 0",
          format.group);
  const bool usual = format.scales == (side == QuantizedSide::keys ? QuantizedScales::channel : QuantizedScales::token);
  require(format.group == 0 || usual, "quantized store: group={} with {}; expected 0", format.group,
          side == QuantizedSide::keys ? "token scales of keys" : "scales of values that are not per token");
  require(!format.channel_factors || format.scales != QuantizedScales::channel,
          "quantized store: factors of channels go with scales of tokens");
  require(is_attention_dtype(format.scale_dtype), "quantized store: scales of {}; expected f32, bf16 or f16",
          name_of(format.scale_dtype));
}

QuantizedTiles QuantizedStore::tiles_of(const Batch& batch, std::int64_t head) const {
  const auto own = static_cast<std::size_t>(head);
  const std::size_t shared = format_.scales == QuantizedScales::token_of_layer ? 0 : own;
  QuantizedTiles tiles;
  tiles.side = side_;
  tiles.format = format_;
  tiles.dim = dim_;
  tiles.tokens = batch.tokens;
  tiles.codes = batch.codes[own].data();
  tiles.steps = batch.steps[shared].data();
  tiles.minima = batch.minima[shared].data();
  tiles.scale_count = fill_up(format_.scales == QuantizedScales::channel ? dim_ : batch.tokens);
  tiles.factors = batch.factors.empty() ? nullptr : batch.factors[own].data();
  return tiles;
}

std::int64_t QuantizedStore::scale_of(const QuantizedTiles& tiles, std::int64_t token, std::int64_t channel) const {
  const bool by_channel = format_.scales == QuantizedScales::channel;
  const std::int64_t group = format_.group > 0 ? (by_channel ? token : channel) / format_.group : 0;
  return group * tiles.scale_count + (by_channel ? channel : token);
}

void QuantizedStore::append(std::int64_t tokens, const ReadRow& read, int threads, const ChannelFactors& factors) {
  if (tokens <= 0) return;
  const auto heads = static_cast<std::size_t>(heads_);
  Batch batch;
  batch.tokens = tokens;
  batch.codes.resize(heads);
  const bool of_layer = format_.scales == QuantizedScales::token_of_layer;
  const std::int64_t grouped = format_.scales == QuantizedScales::channel ? tokens : dim_;
  const std::int64_t groups = format_.group > 0 ? divide_up(grouped, format_.group) : 1;
  const std::int64_t count = groups * fill_up(format_.scales == QuantizedScales::channel ? dim_ : tokens);
  const std::vector<std::byte> no_scales(static_cast<std::size_t>(count) * size_of(format_.scale_dtype));
  batch.steps.assign(of_layer ? 1 : heads, no_scales);
  batch.minima = batch.steps;
  if (format_.channel_factors) batch.factors = factors.empty() ? find_factors(tokens, read, threads) : factors;
  if (of_layer) find_scales_of_layer(batch, read, threads);
  parallel_for(heads_, threads, [&](std::int64_t head, int) {
    if (!of_layer) find_scales(batch, head, read);
    encode(batch, head, read);
  });
  batches_.push_back(std::move(batch));
  tokens_ += tokens;
}

QuantizedStore::ChannelFactors QuantizedStore::find_factors(std::int64_t tokens, const ReadRow& read,
                                                            int threads) const {
  ChannelFactors all(static_cast<std::size_t>(heads_));
  parallel_for(heads_, threads, [&](std::int64_t head, int) {
    std::vector<float>& factors = all[static_cast<std::size_t>(head)];
    factors.assign(static_cast<std::size_t>(fill_up(dim_)), 0.0F);
    std::vector<float> row(static_cast<std::size_t>(dim_));
    for (std::int64_t token = 0; token < tokens; ++token) {
      read(head, token, row.data());
      for (std::size_t d = 0; d < row.size(); ++d) {
        const float magnitude = std::fabs(row[d]);
        // What is not finite spoils the scale of its token, not its channel.
        if (magnitude > factors[d] && std::isfinite(magnitude)) factors[d] = magnitude;
      }
    }
    for (float& factor : factors) factor = factor > 0 ? std::sqrt(factor) : 1.0F;
  });
  return all;
}

void QuantizedStore::divide_by_factors(const Batch& batch, std::int64_t head, float* row) const {
  if (batch.factors.empty()) return;
  const std::vector<float>& factors = batch.factors[static_cast<std::size_t>(head)];
  for (std::int64_t d = 0; d < dim_; ++d) row[d] /= factors[static_cast<std::size_t>(d)];
}

void QuantizedStore::find_scales(Batch& batch, std::int64_t head, const ReadRow& read) const {
  const QuantizedTiles tiles = tiles_of(batch, head);
  const auto own = static_cast<std::size_t>(head);
  std::vector<Range> ranges(batch.steps[own].size() / size_of(format_.scale_dtype));
  std::vector<float> row(static_cast<std::size_t>(dim_));
  for (std::int64_t token = 0; token < batch.tokens; ++token) {
    read(head, token, row.data());
    divide_by_factors(batch, head, row.data());
    for (std::int64_t d = 0; d < dim_; ++d) {
      ranges[static_cast<std::size_t>(scale_of(tiles, token, d))].add(row[static_cast<std::size_t>(d)]);
    }
  }
  for (std::size_t i = 0; i < ranges.size(); ++i) {
    if (ranges[i].low > ranges[i].high && ranges[i].finite) continue;  // nothing there
    store_scale(ranges[i], format_.bits, format_.scale_dtype, static_cast<std::int64_t>(i), batch.steps[own].data(),
                batch.minima[own].data());
  }
}

void QuantizedStore::find_scales_of_layer(Batch& batch, const ReadRow& read, int threads) const {
  parallel_for(divide_up(batch.tokens, kTokensPerItem), threads, [&](std::int64_t item, int) {
    std::vector<float> row(static_cast<std::size_t>(dim_));
    const std::int64_t end = std::min(batch.tokens, (item + 1) * kTokensPerItem);
    for (std::int64_t token = item * kTokensPerItem; token < end; ++token) {
      Range range;
      for (std::int64_t head = 0; head < heads_; ++head) {
        read(head, token, row.data());
        divide_by_factors(batch, head, row.data());
        for (const float x : row) range.add(x);
      }
      store_scale(range, format_.bits, format_.scale_dtype, token, batch.steps[0].data(), batch.minima[0].data());
    }
  });
}

void QuantizedStore::encode(Batch& batch, std::int64_t head, const ReadRow& read) const {
  QuantizedTiles tiles = tiles_of(batch, head);
  const QuantizedBlock last = tiles.block(tiles.blocks() - 1);
  std::vector<std::uint32_t>& codes = batch.codes[static_cast<std::size_t>(head)];
  codes.assign(static_cast<std::size_t>(last.codes - tiles.codes + last.cells * last.cell_words), 0U);
  tiles.codes = codes.data();
  std::vector<CodePlace> places;
  for (std::int64_t depth = 0; depth < granule_depth(format_.bits); ++depth) {
    places.push_back(place_of(format_.bits, depth));
  }
  const bool keys = side_ == QuantizedSide::keys;
  std::vector<float> row(static_cast<std::size_t>(dim_));
  for (std::int64_t token = 0; token < batch.tokens; ++token) {
    read(head, token, row.data());
    divide_by_factors(batch, head, row.data());
    const QuantizedBlock block = tiles.block(token / kQuantizedBlock);
    for (std::int64_t d = 0; d < dim_; ++d) {
      const std::int64_t scale = scale_of(tiles, token, d);
      const float step = load_as_float(tiles.steps, format_.scale_dtype, scale);
      const float minimum = load_as_float(tiles.minima, format_.scale_dtype, scale);
      const std::int64_t depth = keys ? d : token % kQuantizedBlock;
      put(codes.data() + lane_word(tiles, block, token, d), places[static_cast<std::size_t>(depth) % places.size()],
          format_.bits, code_of(row[static_cast<std::size_t>(d)], step, minimum, format_.bits));
    }
  }
}

std::vector<float> QuantizedStore::expand(std::int64_t head, std::size_t batch) const {
  const QuantizedTiles tiles = this->tiles(head, batch);
  std::vector<float> rows;
  rows.reserve(static_cast<std::size_t>(tiles.tokens * dim_));
  for (std::int64_t token = 0; token < tiles.tokens; ++token) {
    const QuantizedBlock block = tiles.block(token / kQuantizedBlock);
    for (std::int64_t d = 0; d < dim_; ++d) {
      const std::int64_t scale = scale_of(tiles, token, d);
      const std::int64_t depth = side_ == QuantizedSide::keys ? d : token % kQuantizedBlock;
      const auto code = static_cast<float>(
          get(tiles.codes + lane_word(tiles, block, token, d), place_of(format_.bits, depth), format_.bits));
      const float x = code * load_as_float(tiles.steps, format_.scale_dtype, scale) +
                      load_as_float(tiles.minima, format_.scale_dtype, scale);
      rows.push_back(tiles.factors == nullptr ? x : x * tiles.factors[d]);
    }
  }
  return rows;
}

QuantizedTiles QuantizedStore::tiles(std::int64_t head, std::size_t batch) const {
  return tiles_of(batches_[batch], head);
}

std::size_t QuantizedStore::memory_bytes() const {
  std::size_t bytes = 0;
  for (const Batch& batch : batches_) {
    for (const auto& codes : batch.codes) bytes += codes.capacity() * sizeof(std::uint32_t);
    for (const auto& steps : batch.steps) bytes += steps.capacity();
    for (const auto& minima : batch.minima) bytes += minima.capacity();
    for (const auto& factors : batch.factors) bytes += factors.capacity() * sizeof(float);
  }
  return bytes;
}

void QuantizedStore::clear() {
  std::vector<Batch>().swap(batches_);
  tokens_ = 0;
}

}  // namespace tessera
