// Products with weights in ggml blocks. Included once per level.
//
// A weight is scale * code - minimum with unsigned codes of 8 bits at most and one scale and minimum per group of 16 or
// 32 numbers, whatever the type. Blocks are unpacked to that form into a buffer that stays in the first-level cache;
// the product of codes and the bytes of the activations is exact, and per group
//   sum = scale * scale of the activations * (codes . bytes) - minimum * sum of the activations.

/// Unpacked numbers: natural order.
struct UnpackedChunk {
  alignas(64) std::uint8_t codes[kBlockChunk];
  alignas(64) float scales[kBlockChunk / 16];
  alignas(64) float minima[kBlockChunk / 16];
};

inline float half_at(const std::uint8_t* p) {
  std::uint16_t bits;
  std::memcpy(&bits, p, 2);
  return half_to_float(bits);
}

// One block of each type: `group` numbers share a scale, `numbers` make a block of `bytes` bytes; codes above 127 are
// `wide`.

struct BlockQ80 {
  static constexpr int group = 32, numbers = 32, bytes = 34;
  static constexpr bool wide = true;
  static void unpack(const std::uint8_t* p, std::uint8_t* codes, float* scale, float* minimum) {
    for (int i = 0; i < 32; ++i) codes[i] = static_cast<std::uint8_t>(p[2 + i] ^ 0x80);
    *scale = half_at(p);
    *minimum = *scale * 128.0F;
  }
};

/// Nibbles, perhaps with a minimum, perhaps with a fifth bit.
template <bool with_minimum, bool fifth>
struct BlockNibbles {
  static constexpr int group = 32, numbers = 32, bytes = 18 + (with_minimum ? 2 : 0) + (fifth ? 4 : 0);
  static constexpr bool wide = false;
  static void unpack(const std::uint8_t* p, std::uint8_t* codes, float* scale, float* minimum) {
    const std::uint8_t* high = p + (with_minimum ? 4 : 2);
    const std::uint8_t* low = high + (fifth ? 4 : 0);
    for (int i = 0; i < 16; ++i) {
      codes[i] = low[i] & 15;
      codes[16 + i] = static_cast<std::uint8_t>(low[i] >> 4);
    }
    if constexpr (fifth) {
      std::uint32_t bits;
      std::memcpy(&bits, high, 4);
      for (std::uint32_t i = 0; i < 32; ++i) codes[i] = static_cast<std::uint8_t>(codes[i] | (bits >> i & 1) << 4);
    }
    *scale = half_at(p);
    *minimum = with_minimum ? -half_at(p + 2) : *scale * (fifth ? 16.0F : 8.0F);
  }
};

/// The scales and then the minima of eight groups, 6 bits each in 12 bytes, as bytes.
inline void spread_factors(const std::uint8_t* p, std::uint8_t* factors) {
  std::uint32_t words[3];
  std::memcpy(words, p, 12);
  const std::uint32_t packed[4]{words[0] & 0x3f3f3f3fU, (words[2] & 0x0f0f0f0fU) | (words[0] >> 6 & 0x03030303U) << 4,
                                words[1] & 0x3f3f3f3fU,
                                (words[2] >> 4 & 0x0f0f0f0fU) | (words[1] >> 6 & 0x03030303U) << 4};
  std::memcpy(factors, packed, 16);
}

inline void group_factors(const std::uint8_t* p, float scale, float least, float* scales, float* minima) {
  std::uint8_t factors[16];
  spread_factors(p, factors);
  for (int i = 0; i < 8; ++i) scales[i] = scale * static_cast<float>(factors[i]);
  for (int i = 0; i < 8; ++i) minima[i] = least * static_cast<float>(factors[8 + i]);
}

template <bool fifth>
struct BlockQ45K {
  static constexpr int group = 32, numbers = 256, bytes = fifth ? 176 : 144;
  static constexpr bool wide = false;
  static void unpack(const std::uint8_t* p, std::uint8_t* codes, float* scales, float* minima) {
    const std::uint8_t* high = p + 16;
    const std::uint8_t* q = high + (fifth ? 32 : 0);
    for (int pair = 0; pair < 4; ++pair) {
      for (int i = 0; i < 32; ++i) {
        codes[pair * 64 + i] = q[pair * 32 + i] & 15;
        codes[pair * 64 + 32 + i] = static_cast<std::uint8_t>(q[pair * 32 + i] >> 4);
      }
      if constexpr (fifth) {
        for (int i = 0; i < 32; ++i) {
          codes[pair * 64 + i] = static_cast<std::uint8_t>(codes[pair * 64 + i] | (high[i] >> 2 * pair & 1) << 4);
          codes[pair * 64 + 32 + i] =
              static_cast<std::uint8_t>(codes[pair * 64 + 32 + i] | (high[i] >> (2 * pair + 1) & 1) << 4);
        }
      }
    }
    group_factors(p + 4, half_at(p), half_at(p + 2), scales, minima);
  }
};

struct BlockQ2K {
  static constexpr int group = 16, numbers = 256, bytes = 84;
  static constexpr bool wide = false;
  static void unpack(const std::uint8_t* p, std::uint8_t* codes, float* scales, float* minima) {
    for (int part = 0; part < 8; ++part) {
      const std::uint8_t* q = p + 16 + part / 4 * 32;
      for (int i = 0; i < 32; ++i) codes[part * 32 + i] = static_cast<std::uint8_t>(q[i] >> part % 4 * 2 & 3);
    }
    const float scale = half_at(p + 80);
    const float least = half_at(p + 82);
    for (int i = 0; i < 16; ++i) {
      scales[i] = scale * static_cast<float>(p[i] & 15);
      minima[i] = least * static_cast<float>(p[i] >> 4);
    }
  }
};

struct BlockQ3K {
  static constexpr int group = 16, numbers = 256, bytes = 110;
  static constexpr bool wide = false;
  static void unpack(const std::uint8_t* p, std::uint8_t* codes, float* scales, float* minima) {
    for (int part = 0; part < 8; ++part) {
      const std::uint8_t* q = p + 32 + part / 4 * 32;
      for (int i = 0; i < 32; ++i) {
        codes[part * 32 + i] = static_cast<std::uint8_t>((q[i] >> part % 4 * 2 & 3) | (p[i] >> part & 1) << 2);
      }
    }
    const std::uint8_t* packed = p + 96;
    const float scale = half_at(p + 108);
    for (int i = 0; i < 16; ++i) {
      const int low = i < 8 ? packed[i] & 15 : packed[i - 8] >> 4;
      const int factor = (low | (packed[8 + i % 4] >> i / 4 * 2 & 3) << 4) - 32;
      scales[i] = scale * static_cast<float>(factor);
      minima[i] = scales[i] * 4.0F;
    }
  }
};

struct BlockQ6K {
  static constexpr int group = 16, numbers = 256, bytes = 210;
  static constexpr bool wide = false;
  static void unpack(const std::uint8_t* p, std::uint8_t* codes, float* scales, float* minima) {
    for (int half = 0; half < 2; ++half) {
      const std::uint8_t* low = p + half * 64;
      const std::uint8_t* high = p + 128 + half * 32;
      std::uint8_t* to = codes + half * 128;
      for (int i = 0; i < 32; ++i) {
        to[i] = static_cast<std::uint8_t>((low[i] & 15) | (high[i] & 3) << 4);
        to[32 + i] = static_cast<std::uint8_t>((low[32 + i] & 15) | (high[i] >> 2 & 3) << 4);
        to[64 + i] = static_cast<std::uint8_t>(low[i] >> 4 | (high[i] >> 4 & 3) << 4);
        to[96 + i] = static_cast<std::uint8_t>(low[32 + i] >> 4 | (high[i] >> 6) << 4);
      }
    }
    const float scale = half_at(p + 208);
    for (int i = 0; i < 16; ++i) {
      scales[i] = scale * static_cast<float>(static_cast<std::int8_t>(p[192 + i]));
      minima[i] = scales[i] * 32.0F;
    }
  }
};

/// Unpacks `count` numbers, whole blocks, to the start of the chunk. Not inlined: GCC 12 drops the stores of the scales
/// when it puts this and a loop that reads them into one function.
template <class Block>
[[gnu::noinline]] void unpack_chunk(const std::uint8_t* p, std::int64_t count, UnpackedChunk& chunk) {
  for (std::int64_t at = 0; at < count; at += Block::numbers) {
    const std::int64_t group = at / Block::group;
    Block::unpack(p, chunk.codes + at, chunk.scales + group, chunk.minima + group);
    p += Block::bytes;
  }
}

/// Adds the product of a chunk and `count` activations to `acc` and, per group, the part of the minima to `low`.
template <class Block>
inline void multiply_chunk(const UnpackedChunk& chunk, const std::int8_t* bytes, const float* x_scales,
                           const float* x_sums, const float* x_sums_of_groups, std::int64_t count, Vec& acc, Vec& low) {
  // The scale of codes times that of bytes, per group.
  constexpr std::int64_t groups_of_chunk = kBlockChunk / Block::group;
  alignas(64) float scales[groups_of_chunk];
  const std::int64_t groups = (count + 16 * Block::group - 1) / (16 * Block::group) * 16;
  for (std::int64_t g = 0; g < groups; ++g) scales[g] = chunk.scales[g] * x_scales[g * Block::group / kActivationGroup];
  if constexpr (Block::group == 32) {
    for (std::int64_t g = 0; g < groups; g += kLanes) {
      low = fma(load(chunk.minima + g), load(x_sums_of_groups + g), low);
    }
  } else {
    for (std::int64_t g = 0; g < groups; g += kLanes) low = fma(load(chunk.minima + g), load(x_sums + g), low);
  }
  constexpr int lanes = Block::group / 4;  // words of a group
  constexpr int step = kLanes * 4;         // numbers of a vector
  const IntVec none = set1_int(0);
  for (std::int64_t at = 0; at < count; at += step) {
    const IntVec codes = load_int(reinterpret_cast<const std::int32_t*>(chunk.codes + at));
    const IntVec numbers = load_int(reinterpret_cast<const std::int32_t*>(bytes + at));
    const IntVec products = multiply_add_bytes<Block::wide>(codes, numbers, none);
    acc = fma(to_float(products), spread_lanes<lanes>(scales + at / Block::group), acc);
  }
}

/// y[r][o] for rows of activations that are multiplied together.
template <class Block>
inline void multiply_rows(const BlockRows& weights, const ByteActivations& x, float* y, std::int64_t y_stride) {
  UnpackedChunk chunk{};
  for (std::int64_t o = 0; o < weights.outputs; ++o) {
    const auto* p = reinterpret_cast<const std::uint8_t*>(weights.blocks + o * weights.row_bytes);
    Vec acc[kBlockRows];
    Vec low[kBlockRows];
    for (std::int64_t r = 0; r < x.rows; ++r) acc[r] = low[r] = zero();
    for (std::int64_t first = 0; first < weights.inputs; first += kBlockChunk) {
      const std::int64_t count = std::min(kBlockChunk, weights.inputs - first);
      const std::int64_t bytes = count / Block::numbers * Block::bytes;
      // Far enough ahead that memory is never waited for; what lies behind the last row is not touched by asking.
      for (std::int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(p + line + 8192, 0, 2);
      if (count < kBlockChunk) {
        std::fill(chunk.scales, chunk.scales + kBlockChunk / 16, 0.0F);
        std::fill(chunk.minima, chunk.minima + kBlockChunk / 16, 0.0F);
      }
      unpack_chunk<Block>(p, count, chunk);
      for (std::int64_t r = 0; r < x.rows; ++r) {
        multiply_chunk<Block>(chunk, x.bytes + r * x.padded + first, x.scales + (r * x.padded + first) / 32,
                              x.sums + (r * x.padded + first) / 16, x.sums_of_groups + (r * x.padded + first) / 32,
                              count, acc[r], low[r]);
      }
      p += bytes;
    }
    for (std::int64_t r = 0; r < x.rows; ++r) y[r * y_stride + o] = reduce_add(sub(acc[r], low[r]));
  }
}

// One row of activations, which is what decoding multiplies: codes go from memory to a register and never through a
// buffer.

/// Products of whole bytes cost no more than those of nibbles.
#if defined(TESSERA_LEVEL_BF16)
constexpr bool kWideBytes = true;
#else
constexpr bool kWideBytes = false;
#endif
/// Groups of 32 numbers that a vector of words holds.
constexpr int kHalves = kLanes / 8;
/// Rows of weights whose sums are reduced together.
constexpr int kRowsTogether = 4;
/// K types take about as long to unpack as to read, so their weights are asked for this far ahead; what lies behind the
/// last row is not touched by asking. The others wait for memory anyway, and a machine that sees a single stream reads
/// on by itself, faster than it is asked: requests have a shorter queue, in the first cache.
constexpr std::int64_t kAhead = 8192;

inline void prefetch_ahead(const std::uint8_t* p, std::int64_t bytes) {
  for (std::int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(p + kAhead + line, 0, 2);
}

/// y[o] = the sum of dot(row o) for every row of weights, reduced in fours. Rows are read one after another: memory
/// gives a core most when all its reads are one stream.
template <class Dot>
inline void for_each_row(const BlockRows& weights, float* y, const Dot& dot) {
  const auto row = [&](std::int64_t o) {
    return reinterpret_cast<const std::uint8_t*>(weights.blocks + o * weights.row_bytes);
  };
  std::int64_t o = 0;
  for (; o + kRowsTogether <= weights.outputs; o += kRowsTogether) {
    Vec sums[kRowsTogether];
    // Unrolled, the compiler would mix the reads of the rows.
#pragma GCC unroll 1
    for (int r = 0; r < kRowsTogether; ++r) sums[r] = dot(row(o + r));
    reduce_add4(sums, y + o);
  }
  const std::int64_t rest = weights.outputs - o;
  if (rest == 0) return;
  // In fours as well: what a sum is must not depend on the rows beside it.
  Vec sums[kRowsTogether]{zero(), zero(), zero(), zero()};
  for (std::int64_t r = 0; r < rest; ++r) sums[r] = dot(row(o + r));
  float results[kRowsTogether];
  reduce_add4(sums, results);
  for (std::int64_t r = 0; r < rest; ++r) y[o + r] = results[r];
}

/// dot(block, first, count) for blocks of 32 numbers, kLanes of them at a time: blocks [first, first + count) of the
/// row. `count`, a constant, is a multiple of 4.
template <std::int64_t size, class Dot>
[[gnu::always_inline]] inline void for_each_lanes(const std::uint8_t* p, std::int64_t blocks, const Dot& dot) {
  constexpr std::integral_constant<int, kLanes> all;
  std::int64_t first = 0;
  for (; first + kLanes <= blocks; first += kLanes) dot(p + first * size, first, all);
  const std::int64_t rest = blocks - first;
  if (rest == 0) return;
  p += first * size;
  if (rest == 4) return dot(p, first, std::integral_constant<int, 4>{});
  if constexpr (kLanes == 16) {
    if (rest == 8) return dot(p, first, std::integral_constant<int, 8>{});
    if (rest == 12) return dot(p, first, std::integral_constant<int, 12>{});
  }
  std::uint8_t last[kLanes * size]{};
  std::memcpy(last, p, static_cast<std::size_t>(rest * size));
  dot(last, first, all);
}

[[gnu::always_inline]] inline Vec dot_q80(const std::uint8_t* p, std::int64_t blocks, const ByteActivations& x) {
  constexpr std::int64_t size = BlockQ80::bytes;
  Vec acc[2]{zero(), zero()};
  Vec low = zero();
  for_each_lanes<size>(
      p, blocks, [&](const std::uint8_t* block, std::int64_t first, auto count) __attribute__((always_inline)) {
        const Vec own = collect_half_numbers<count()>(block, size);
        const Vec factors = mul(own, load(x.scales + first));
        low = fma(own, load(x.sums_of_groups + first), low);
        constexpr int own_blocks = count();
#pragma GCC unroll 8
        for (int i = 0; i < own_blocks; i += kHalves) {
          const IntVec codes = flip_signs(load_halves(block + i * size + 2, size));
          const IntVec numbers = load_int(reinterpret_cast<const std::int32_t*>(x.bytes + (first + i) * 32));
          const Vec products = to_float(multiply_add_bytes<true>(codes, numbers, set1_int(0)));
          acc[i / kHalves % 2] = fma(products, spread_two<1>(factors, i), acc[i / kHalves % 2]);
        }
      });
  return fma(low, set1(-128.0F), add(acc[0], acc[1]));
}

/// Products of nibbles, the low and the high ones of a vector, with the activations of each: one group on four lanes.
inline Vec multiply_nibbles(IntVec low, IntVec high, const std::int8_t* numbers, const std::int8_t* numbers_of_high) {
  const IntVec first = load_int(reinterpret_cast<const std::int32_t*>(numbers));
  const IntVec second = load_int(reinterpret_cast<const std::int32_t*>(numbers_of_high));
  return to_float(multiply_add_bytes<false>(high, second, multiply_add_bytes<false>(low, first, set1_int(0))));
}

/// Q4_0, Q4_1, Q5_0, Q5_1.
template <bool with_minimum, bool fifth>
[[gnu::always_inline]] inline Vec dot_nibbles(const std::uint8_t* p, std::int64_t blocks, const ByteActivations& x) {
  constexpr std::int64_t size = BlockNibbles<with_minimum, fifth>::bytes;
  constexpr int bits_at = with_minimum ? 4 : 2;
  constexpr int nibbles_at = bits_at + (fifth ? 4 : 0);
  constexpr int quarters = kLanes / 4;
  const IntVec low_bits = set1_int(0x0f0f0f0f);
  Vec acc[2]{zero(), zero()};
  Vec low = zero();
  for_each_lanes<size>(
      p, blocks, [&](const std::uint8_t* block, std::int64_t first, auto count) __attribute__((always_inline)) {
        const Vec own = collect_half_numbers<count()>(block, size);
        const Vec least = with_minimum ? collect_half_numbers<count()>(block + 2, size) : own;
        const Vec factors = mul(own, load(x.scales + first));
        low = fma(least, load(x.sums_of_groups + first), low);
        constexpr int own_blocks = count();
#pragma GCC unroll 4
        for (int i = 0; i < own_blocks; i += quarters) {
          const std::uint8_t* from = block + i * size;
          const IntVec codes = load_quarters(from + nibbles_at, size);
          IntVec even = bits_and(codes, low_bits);
          IntVec odd = bits_and(shift_right<4>(codes), low_bits);
          if constexpr (fifth) {
            even = add_fifth_bits(even, from + bits_at, size);
            odd = add_fifth_bits(odd, from + bits_at + 2, size);
          }
          const std::int8_t* numbers = x.quartered + (first + i) / 4 * 128 + (first + i) % 4 * 16;
          const Vec products = multiply_nibbles(even, odd, numbers, numbers + 64);
          acc[i / quarters % 2] = fma(products, spread_fours<1>(factors, i), acc[i / quarters % 2]);
        }
      });
  return fma(low, set1(with_minimum ? 1.0F : fifth ? -16.0F : -8.0F), add(acc[0], acc[1]));
}

/// Q4_K, and Q5_K where there is a fifth bit.
template <bool fifth>
inline Vec dot_q45_k(const std::uint8_t* p, std::int64_t inputs, const ByteActivations& x) {
  constexpr std::int64_t size = BlockQ45K<fifth>::bytes;
  Vec acc[2]{zero(), zero()};
  Vec low = zero();
  // Nibbles of odd groups stay where they are, 16 times as large, where products of such bytes cost no more.
  constexpr bool in_place = !fifth && kWideBytes;
  const IntVec low_bits = set1_int(0x0f0f0f0f);
  [[maybe_unused]] const IntVec high_bits = set1_int(static_cast<std::int32_t>(0xf0f0f0f0U));
  const IntVec fifth_bit = set1_int(0x10101010);
  for (std::int64_t first = 0; first < inputs; first += 256, p += size) {
    prefetch_ahead(p, size);
    const GroupFactors factors = weigh_groups(p, x.group_weights + first / 16);
    low = add_minima(low, factors);
    // A quarter is half a group: even groups lie in low nibbles, odd ones in high nibbles.
    const auto multiply = [&](auto vector) __attribute__((always_inline)) {
      constexpr int v = vector();
      const auto* codes = reinterpret_cast<const std::int32_t*>(p + (fifth ? 48 : 16) + v * 64);
      const IntVec one = load_int(codes);
      const IntVec two = load_int(codes + kLanes);
      const std::int8_t* numbers = x.paired + first + v * 32;
      const auto half = [&](IntVec own, [[maybe_unused]] auto which, auto odd) __attribute__((always_inline)) {
        IntVec nibbles = own;
        if constexpr (odd() && !in_place) nibbles = shift_right<4>(own);
        nibbles = bits_and(nibbles, odd() && in_place ? high_bits : low_bits);
        if constexpr (fifth) {
          const IntVec bits = repeat_quarter(p + 16 + which() * 16);
          nibbles = bits_or(nibbles, bits_and(shift_quarters<4 - 4 * v - odd()>(bits), fifth_bit));
        }
        return nibbles;
      };
      constexpr std::integral_constant<int, 0> none;
      constexpr std::integral_constant<int, 1> other;
      const IntVec a = even_quarters(one, two);
      const IntVec b = odd_quarters(one, two);
      acc[0] = fma(multiply_nibbles(half(a, none, none), half(b, other, none), numbers, numbers + 64),
                   spread_fours<2>(factors.scales, 4 * v), acc[0]);
      acc[1] = fma(multiply_nibbles(half(a, none, other), half(b, other, other), numbers + 128, numbers + 192),
                   spread_fours<2>(factors.scales, 4 * v + 1), acc[1]);
    };
    multiply(std::integral_constant<int, 0>{});
    if constexpr (kHalves == 1) multiply(std::integral_constant<int, 1>{});
  }
  const Vec sum = in_place ? fma(acc[1], set1(1.0F / 16), acc[0]) : add(acc[0], acc[1]);
  return sub(sum, drop_scales(low));
}

/// Bytes 0 to 15 of the scales of a Q3_K block, 32 too large.
inline void spread_signed_factors(const std::uint8_t* p, std::uint8_t* factors) {
  std::uint32_t words[3];
  std::memcpy(words, p, 12);
  std::uint32_t packed[4];
  for (std::uint32_t i = 0; i < 4; ++i) {
    packed[i] = (words[i % 2] >> i / 2 * 4 & 0x0f0f0f0fU) | (words[2] >> i * 2 & 0x03030303U) << 4;
  }
  std::memcpy(factors, packed, 16);
}

/// Q2_K, and Q3_K where there is a third bit.
template <bool third>
inline Vec dot_q23_k(const std::uint8_t* p, std::int64_t inputs, const ByteActivations& x) {
  constexpr std::int64_t size = third ? BlockQ3K::bytes : BlockQ2K::bytes;
  constexpr int vectors = 16 / kLanes;  // of the 16 scales of a block
  Vec acc[2]{zero(), zero()};
  Vec low = zero();
  const IntVec two_bits = set1_int(0x03030303);
  const IntVec third_bit = set1_int(0x04040404);
  for (std::int64_t first = 0; first < inputs; first += 256, p += size) {
    prefetch_ahead(p, size);
    std::uint8_t scales[16];
    std::uint8_t minima[16];
    if constexpr (third) {
      spread_signed_factors(p + 96, scales);
    } else {
      std::uint64_t words[2];
      std::memcpy(words, p, 16);
      for (int i = 0; i < 2; ++i) {
        const std::uint64_t nibbles[2]{words[i] & 0x0f0f0f0f0f0f0f0fU, words[i] >> 4 & 0x0f0f0f0f0f0f0f0fU};
        std::memcpy(scales + i * 8, nibbles, 8);
        std::memcpy(minima + i * 8, nibbles + 1, 8);
      }
    }
    const Vec scale = set_half_number(p + (third ? 108 : 80));
    Vec factors[vectors];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      Vec own = load_signed_bytes(scales + v * kLanes);
      if constexpr (third) own = sub(own, set1(32.0F));
      own = mul(own, scale);
      Vec least = own;
      if constexpr (!third) least = mul(load_signed_bytes(minima + v * kLanes), set_half_number(p + 82));
      low = fma(least, load(x.sums + first / 16 + v * kLanes), low);
      factors[v] = mul(own, load_twice(x.scales + first / 32 + v * kLanes / 2));
    }
    // 32 numbers of one half of the block, and with 16 lanes the 32 behind them.
    const auto multiply = [&](auto half, auto part) __attribute__((always_inline)) {
      constexpr int k = part();
      IntVec codes = load_halves(p + (third ? 32 : 16) + half() * 32, 0);
      codes = bits_and(shift_halves<-2 * k, -2 * k - 2>(codes), two_bits);
      if constexpr (third) {
        constexpr int left = 2 - half() * 4 - k;
        codes = bits_or(codes, bits_and(shift_halves<left, left - 1>(repeat_half(p)), third_bit));
      }
      constexpr int at = half() * 128 + k * 32;
      const IntVec numbers = load_int(reinterpret_cast<const std::int32_t*>(x.bytes + first + at));
      const Vec products = to_float(multiply_add_bytes<false>(codes, numbers, set1_int(0)));
      constexpr int chain = k / kHalves % 2;
      acc[chain] = fma(products, spread_fours<1>(factors[at / 16 / kLanes], at / 16 % kLanes), acc[chain]);
    };
    const auto multiply_half = [&](auto half) __attribute__((always_inline)) {
      multiply(half, std::integral_constant<int, 0>{});
      if constexpr (kHalves == 1) multiply(half, std::integral_constant<int, 1>{});
      multiply(half, std::integral_constant<int, 2>{});
      if constexpr (kHalves == 1) multiply(half, std::integral_constant<int, 3>{});
    };
    multiply_half(std::integral_constant<int, 0>{});
    multiply_half(std::integral_constant<int, 1>{});
  }
  return fma(low, set1(third ? -4.0F : -1.0F), add(acc[0], acc[1]));
}

inline Vec dot_q6_k(const std::uint8_t* p, std::int64_t inputs, const ByteActivations& x) {
  constexpr std::int64_t size = BlockQ6K::bytes;
  constexpr int vectors = 16 / kLanes;  // of the 16 scales of a block
  Vec acc[2]{zero(), zero()};
  Vec low = zero();
  const IntVec low_bits = set1_int(0x0f0f0f0f);
  const IntVec high_bits = set1_int(0x30303030);
  for (std::int64_t first = 0; first < inputs; first += 256, p += size) {
    prefetch_ahead(p, size);
    const Vec scale = set_half_number(p + 208);
    Vec factors[vectors];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      const Vec own = mul(load_signed_bytes(p + 192 + v * kLanes), scale);
      low = fma(own, load(x.sums + first / 16 + v * kLanes), low);
      factors[v] = mul(own, load_twice(x.scales + first / 32 + v * kLanes / 2));
    }
    // Numbers [at, at + 4 * kLanes) of the block.
    const auto multiply = [&](IntVec codes, int at, int chain) __attribute__((always_inline)) {
      const IntVec numbers = load_int(reinterpret_cast<const std::int32_t*>(x.bytes + first + at));
      const Vec products = to_float(multiply_add_bytes<false>(codes, numbers, set1_int(0)));
      const int group = at / 16;
      acc[chain] = fma(products, spread_fours<1>(factors[group / kLanes], group % kLanes), acc[chain]);
    };
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const auto* nibbles = reinterpret_cast<const std::int32_t*>(p + half * 64);
      const IntVec high = repeat_half(p + 128 + half * 32);
      const auto joined = [&](IntVec nibble, IntVec two) __attribute__((always_inline)) {
        return bits_or(bits_and(nibble, low_bits), bits_and(two, high_bits));
      };
      const IntVec one = load_int(nibbles);
      const int at = half * 128;
      if constexpr (kHalves == 2) {
        multiply(joined(one, shift_halves<4, 2>(high)), at, 0);
        multiply(joined(shift_right<4>(one), shift_halves<0, -2>(high)), at + 64, 1);
      } else {
        const IntVec other = load_int(nibbles + 8);
        multiply(joined(one, shift_halves<4, 4>(high)), at, 0);
        multiply(joined(other, shift_halves<2, 2>(high)), at + 32, 1);
        multiply(joined(shift_right<4>(one), high), at + 64, 0);
        multiply(joined(shift_right<4>(other), shift_halves<-2, -2>(high)), at + 96, 1);
      }
    }
  }
  return fma(low, set1(-32.0F), add(acc[0], acc[1]));
}

/// y[o] for one row of activations.
inline void multiply_one_row(const BlockRows& weights, const ByteActivations& x, float* y) {
  const std::int64_t inputs = weights.inputs;
  switch (weights.type) {
    case GgmlType::q8_0:
      return for_each_row(
          weights, y, [&](const auto* p) __attribute__((always_inline)) { return dot_q80(p, inputs / 32, x); });
    case GgmlType::q4_0:
      return for_each_row(
          weights, y, [&](const auto* p) __attribute__((always_inline)) {
            return dot_nibbles<false, false>(p, inputs / 32, x);
          });
    case GgmlType::q4_1:
      return for_each_row(
          weights,
          y, [&](const auto* p) __attribute__((always_inline)) { return dot_nibbles<true, false>(p, inputs / 32, x); });
    case GgmlType::q5_0:
      return for_each_row(
          weights,
          y, [&](const auto* p) __attribute__((always_inline)) { return dot_nibbles<false, true>(p, inputs / 32, x); });
    case GgmlType::q5_1:
      return for_each_row(
          weights,
          y, [&](const auto* p) __attribute__((always_inline)) { return dot_nibbles<true, true>(p, inputs / 32, x); });
    case GgmlType::q2_k:
      return for_each_row(weights, y, [&](const auto* p) { return dot_q23_k<false>(p, inputs, x); });
    case GgmlType::q3_k:
      return for_each_row(weights, y, [&](const auto* p) { return dot_q23_k<true>(p, inputs, x); });
    case GgmlType::q4_k:
      return for_each_row(weights, y, [&](const auto* p) { return dot_q45_k<false>(p, inputs, x); });
    case GgmlType::q5_k:
      return for_each_row(weights, y, [&](const auto* p) { return dot_q45_k<true>(p, inputs, x); });
    default:
      return for_each_row(weights, y, [&](const auto* p) { return dot_q6_k(p, inputs, x); });
  }
}

/// Calls body(Block{}) for the type of the blocks.
template <class Body>
inline void with_block(GgmlType type, const Body& body) {
  switch (type) {
    case GgmlType::q8_0:
      return body(BlockQ80{});
    case GgmlType::q4_0:
      return body(BlockNibbles<false, false>{});
    case GgmlType::q4_1:
      return body(BlockNibbles<true, false>{});
    case GgmlType::q5_0:
      return body(BlockNibbles<false, true>{});
    case GgmlType::q5_1:
      return body(BlockNibbles<true, true>{});
    case GgmlType::q2_k:
      return body(BlockQ2K{});
    case GgmlType::q3_k:
      return body(BlockQ3K{});
    case GgmlType::q4_k:
      return body(BlockQ45K<false>{});
    case GgmlType::q5_k:
      return body(BlockQ45K<true>{});
    default:
      return body(BlockQ6K{});
  }
}

inline void multiply_blocks(const BlockRows& weights, const ByteActivations& x, float* y, std::int64_t y_stride) {
  if (x.rows == 1) return multiply_one_row(weights, x, y);
  with_block(weights.type, [&](auto block) { multiply_rows<decltype(block)>(weights, x, y, y_stride); });
}

/// Whole blocks as floats.
template <class Block>
inline void widen_chunks(const std::uint8_t* p, std::int64_t numbers, float* out) {
  UnpackedChunk chunk{};
  for (std::int64_t first = 0; first < numbers; first += kBlockChunk) {
    const std::int64_t count = std::min(kBlockChunk, numbers - first);
    unpack_chunk<Block>(p, count, chunk);
    for (std::int64_t g = 0; g < count / Block::group; ++g) {
      for (int i = 0; i < Block::group; ++i) {
        out[first + g * Block::group + i] =
            chunk.scales[g] * static_cast<float>(chunk.codes[g * Block::group + i]) - chunk.minima[g];
      }
    }
    p += count / Block::numbers * Block::bytes;
  }
}

inline void widen_blocks(GgmlType type, const std::byte* blocks, std::int64_t numbers, float* out) {
  with_block(type, [&](auto block) {
    widen_chunks<decltype(block)>(reinterpret_cast<const std::uint8_t*>(blocks), numbers, out);
  });
}

/// Groups of activations whose largest numbers are found together.
constexpr std::int64_t kGroupsTogether = 16;

/// The largest magnitude of each of up to kGroupsTogether groups, NaN for a group that holds NaN or Inf: a vector per
/// group, turned so that groups lie side by side and nothing is reduced within a vector.
inline void group_magnitudes(const float* x, std::int64_t groups, float* largest) {
  alignas(64) float rows[kGroupsTogether * 16];
  alignas(64) std::uint32_t turned[16 * kGroupsTogether];
  const std::byte* pointers[kGroupsTogether];
  for (std::int64_t g = 0; g < kGroupsTogether; ++g) {
    pointers[g] = reinterpret_cast<const std::byte*>(rows + std::min(g, groups - 1) * 16);
    if (g >= groups) continue;
    for (int lane = 0; lane < 16; lane += kLanes) {
      const Vec first = load(x + g * kActivationGroup + lane);
      const Vec second = load(x + g * kActivationGroup + 16 + lane);
      const Vec magnitude = at_least(at_least(first, sub(zero(), first)), at_least(second, sub(zero(), second)));
      // x - x is 0 for finite numbers and NaN otherwise.
      store(rows + g * 16 + lane, add(magnitude, add(sub(first, first), sub(second, second))));
    }
  }
  for (int word = 0; word < 16; word += kTransposeWords) transpose_block(pointers, word * 4, turned + word * 16);
  for (int lane = 0; lane < kGroupsTogether; lane += kLanes) {
    Vec highest = zero();
    Vec difference = zero();
    for (int word = 0; word < 16; ++word) {
      const Vec value = load_words(turned + word * kGroupsTogether + lane);
      highest = at_least(highest, value);
      difference = add(difference, sub(value, value));
    }
    store(largest + lane, add(highest, difference));
  }
}

/// Writes the bytes of one group and adds them up, half by half.
inline void quantise_group(const float* x, float scale, std::int8_t* bytes, Vec* sums) {
  if (!(scale > 0)) {  // 0 or NaN
    std::memset(bytes, 0, kActivationGroup);
    return;
  }
  const Vec divisor = set1(scale);
  for (int from = 0; from < kActivationGroup; from += kLanes) {
    const IntVec rounded = round_to_int(div(load(x + from), divisor));
    store_low_bytes(reinterpret_cast<std::uint8_t*>(bytes + from), rounded);
    sums[from / 16] = add(sums[from / 16], to_float(rounded));
  }
}

/// What ByteActivations holds of `count` numbers, a multiple of 32.
inline void quantise_activations(const float* x, std::int64_t count, std::int8_t* bytes, std::int8_t* paired,
                                 std::int8_t* quartered, float* scales, float* sums, float* sums_of_groups,
                                 float* group_weights) {
  const std::int64_t groups = count / kActivationGroup;
  alignas(64) float largest[kGroupsTogether];
  for (std::int64_t first = 0; first < groups; first += 2) {
    if (first % kGroupsTogether == 0) {
      group_magnitudes(x + first * kActivationGroup, std::min(kGroupsTogether, groups - first), largest);
    }
    const std::int64_t pair = std::min<std::int64_t>(2, groups - first);
    alignas(64) std::int8_t rounded[2 * kActivationGroup];
    Vec halves[4]{zero(), zero(), zero(), zero()};
    for (std::int64_t i = 0; i < pair; ++i) {
      scales[first + i] = largest[(first + i) % kGroupsTogether] / 127.0F;
      quantise_group(x + (first + i) * kActivationGroup, scales[first + i], rounded + i * kActivationGroup,
                     halves + i * 2);
    }
    float totals[4];
    reduce_add4(halves, totals);
    if (bytes != nullptr) {
      std::memcpy(bytes + first * kActivationGroup, rounded, static_cast<std::size_t>(pair * kActivationGroup));
    }
    for (std::int64_t i = 0; i < pair; ++i) {
      const std::int64_t g = first + i;
      const float of_half[2]{scales[g] * totals[i * 2], scales[g] * totals[i * 2 + 1]};
      sums_of_groups[g] = of_half[0] + of_half[1];
      if (group_weights != nullptr) {
        float* eight = group_weights + g / 8 * 16 + g % 8;
        eight[0] = scales[g];
        eight[8] = sums_of_groups[g];
      }
      for (std::int64_t half = 0; half < 2; ++half) {
        const std::int8_t* own = rounded + i * kActivationGroup + half * 16;
        if (sums != nullptr) sums[g * 2 + half] = of_half[half];
        if (paired != nullptr) {
          std::memcpy(paired + g / 8 * 256 + g % 2 * 128 + half * 64 + g % 8 / 2 * 16, own, 16);
        }
        if (quartered != nullptr) std::memcpy(quartered + g / 4 * 128 + half * 64 + g % 4 * 16, own, 16);
      }
    }
  }
}
