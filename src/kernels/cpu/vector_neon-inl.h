// 128-bit vectors of 64-bit Arm. Included by vector-inl.h.

// A vector is two registers of four lanes: the 32 registers hold what the 16 of AVX2 hold, and products are blocked in
// the same way. A broadcast is one register that stands for both halves.

constexpr int kLanes = 8;
struct Vec {
  float32x4_t low;
  float32x4_t high;
};
struct IntVec {
  int32x4_t low;
  int32x4_t high;
};
struct Mask {
  uint32x4_t low;
  uint32x4_t high;
};

inline Vec set1(float x) {
  const float32x4_t all = vdupq_n_f32(x);
  return {all, all};
}
inline Vec zero() {
  return set1(0);
}
inline Vec load(const float* p) {
  return {vld1q_f32(p), vld1q_f32(p + 4)};
}
inline void store(float* p, Vec x) {
  vst1q_f32(p, x.low);
  vst1q_f32(p + 4, x.high);
}
inline Vec load_words(const std::uint32_t* p) {
  return {vreinterpretq_f32_u32(vld1q_u32(p)), vreinterpretq_f32_u32(vld1q_u32(p + 4))};
}
inline Vec broadcast_word(const std::uint32_t* p) {
  const float32x4_t all = vreinterpretq_f32_u32(vld1q_dup_u32(p));
  return {all, all};
}
inline Vec add(Vec a, Vec b) {
  return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)};
}
inline Vec sub(Vec a, Vec b) {
  return {vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)};
}
inline Vec mul(Vec a, Vec b) {
  return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)};
}
inline Vec div(Vec a, Vec b) {
  return {vdivq_f32(a.low, b.low), vdivq_f32(a.high, b.high)};
}
inline Vec fma(Vec a, Vec b, Vec c) {
  return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
}
// Not FMAX and FMIN, which give NaN when either number is NaN.
inline Vec at_least(Vec limit, Vec x) {
  return {vbslq_f32(vcgtq_f32(limit.low, x.low), limit.low, x.low),
          vbslq_f32(vcgtq_f32(limit.high, x.high), limit.high, x.high)};
}
inline Vec at_most(Vec limit, Vec x) {
  return {vbslq_f32(vcltq_f32(limit.low, x.low), limit.low, x.low),
          vbslq_f32(vcltq_f32(limit.high, x.high), limit.high, x.high)};
}
inline float32x4_t shift_into_exponent(float32x4_t x) {
  return vreinterpretq_f32_s32(vshlq_n_s32(vreinterpretq_s32_f32(x), 23));
}
inline Vec shift_into_exponent(Vec x) {
  return {shift_into_exponent(x.low), shift_into_exponent(x.high)};
}
inline float reduce_max(Vec x) {
  return vmaxnmvq_f32(vmaxnmq_f32(x.low, x.high));
}
inline bool any_greater(Vec a, Vec b) {
  return vmaxvq_u32(vorrq_u32(vcgtq_f32(a.low, b.low), vcgtq_f32(a.high, b.high))) != 0;
}
inline float reduce_add(Vec x) {
  return vaddvq_f32(vaddq_f32(x.low, x.high));
}

/// out[i] = sum of the lanes of x[i].
inline void reduce_add4(const Vec (&x)[4], float* out) {
  const float32x4_t ab = vpaddq_f32(vaddq_f32(x[0].low, x[0].high), vaddq_f32(x[1].low, x[1].high));
  const float32x4_t cd = vpaddq_f32(vaddq_f32(x[2].low, x[2].high), vaddq_f32(x[3].low, x[3].high));
  vst1q_f32(out, vpaddq_f32(ab, cd));
}

inline IntVec set1_int(std::int32_t x) {
  const int32x4_t all = vdupq_n_s32(x);
  return {all, all};
}
inline IntVec load_int(const std::int32_t* p) {
  return {vld1q_s32(p), vld1q_s32(p + 4)};
}
inline Vec to_float(IntVec x) {
  return {vcvtq_f32_s32(x.low), vcvtq_f32_s32(x.high)};
}
template <int n>
inline IntVec shift_right(IntVec x) {
  const auto shift = [](int32x4_t half) { return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(half), n)); };
  return {shift(x.low), shift(x.high)};
}
template <int n>
inline IntVec shift_left(IntVec x) {
  return {vshlq_n_s32(x.low, n), vshlq_n_s32(x.high, n)};
}
inline IntVec bits_and(IntVec a, IntVec b) {
  return {vandq_s32(a.low, b.low), vandq_s32(a.high, b.high)};
}
inline IntVec bits_or(IntVec a, IntVec b) {
  return {vorrq_s32(a.low, b.low), vorrq_s32(a.high, b.high)};
}
inline void store_low_bytes(std::int8_t* p, Vec words) {
  const uint16x4_t low = vmovn_u32(vreinterpretq_u32_f32(words.low));
  const uint16x4_t high = vmovn_u32(vreinterpretq_u32_f32(words.high));
  vst1_s8(p, vreinterpret_s8_u8(vmovn_u16(vcombine_u16(low, high))));
}
/// sum + the products of unsigned bytes of a and signed bytes of b in every word. Bytes at even and at odd places
/// become 16-bit numbers, whose products fit into 16 bits; what belongs to one operand is worked out once for all the
/// products that it takes part in.
inline int32x4_t multiply_add_bytes(int32x4_t a, int32x4_t b, int32x4_t sum) {
  const uint16x8_t bytes = vreinterpretq_u16_s32(a);
  const int16x8_t a_even = vreinterpretq_s16_u16(vandq_u16(bytes, vdupq_n_u16(0xff)));
  const int16x8_t a_odd = vreinterpretq_s16_u16(vshrq_n_u16(bytes, 8));
  const int16x8_t b_even = vshrq_n_s16(vshlq_n_s16(vreinterpretq_s16_s32(b), 8), 8);
  const int16x8_t b_odd = vshrq_n_s16(vreinterpretq_s16_s32(b), 8);
  return vpadalq_s16(vpadalq_s16(sum, vmulq_s16(a_even, b_even)), vmulq_s16(a_odd, b_odd));
}
template <bool wide>
inline IntVec multiply_add_bytes(IntVec a, IntVec b, IntVec sum) {
  return {multiply_add_bytes(a.low, b.low, sum.low), multiply_add_bytes(a.high, b.high, sum.high)};
}
inline Mask not_less(IntVec a, IntVec b) {
  return {vcgeq_s32(a.low, b.low), vcgeq_s32(a.high, b.high)};
}
inline Mask both(Mask a, Mask b) {
  return {vandq_u32(a.low, b.low), vandq_u32(a.high, b.high)};
}
inline Mask mask_from_bits(std::uint32_t bits) {
  static constexpr std::uint32_t select_bit[8] = {1, 2, 4, 8, 16, 32, 64, 128};
  const uint32x4_t all = vdupq_n_u32(bits);
  return {vtstq_u32(all, vld1q_u32(select_bit)), vtstq_u32(all, vld1q_u32(select_bit + 4))};
}
inline Vec select(Mask m, Vec yes, Vec no) {
  return {vbslq_f32(m.low, yes.low, no.low), vbslq_f32(m.high, yes.high, no.high)};
}
/// [bits][byte]: which byte of the packed numbers goes there; 255, beyond them, gives 0.
struct ExpandTable {
  alignas(16) std::uint8_t from[256][32];
  constexpr ExpandTable() : from{} {
    for (int bits = 0; bits < 256; ++bits) {
      int next = 0;
      for (int lane = 0; lane < 8; ++lane) {
        const bool taken = (bits >> lane & 1) != 0;
        for (int byte = 0; byte < 4; ++byte) {
          from[bits][lane * 4 + byte] = static_cast<std::uint8_t>(taken ? next * 4 + byte : 255);
        }
        next += taken ? 1 : 0;
      }
    }
  }
};
constexpr ExpandTable kExpandTable;
inline Vec expand_lanes(Vec x, std::uint32_t bits) {
  const uint8x16x2_t packed = {{vreinterpretq_u8_f32(x.low), vreinterpretq_u8_f32(x.high)}};
  const std::uint8_t* from = kExpandTable.from[bits];
  return {vreinterpretq_f32_u8(vqtbl2q_u8(packed, vld1q_u8(from))),
          vreinterpretq_f32_u8(vqtbl2q_u8(packed, vld1q_u8(from + 16)))};
}

inline Vec load_bf16(const std::uint16_t* p) {
  const uint16x8_t halves = vld1q_u16(p);
  return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(halves), 16)),
          vreinterpretq_f32_u32(vshll_high_n_u16(halves, 16))};
}
inline Vec widen_f16(uint16x8_t halves) {
  const float16x8_t numbers = vreinterpretq_f16_u16(halves);
  return {vcvt_f32_f16(vget_low_f16(numbers)), vcvt_high_f32_f16(numbers)};
}
inline Vec load_f16(const std::uint16_t* p) {
  return widen_f16(vld1q_u16(p));
}
inline void store_f16(std::uint16_t* p, Vec x) {
  vst1q_u16(p, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(x.low), x.high)));
}
inline uint16x4_t round_to_bf16(float32x4_t x) {
  const uint32x4_t bits = vreinterpretq_u32_f32(x);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
  return vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), rounded, quiet), 16);
}
inline void store_bf16(std::uint16_t* p, Vec x) {
  vst1q_u16(p, vcombine_u16(round_to_bf16(x.low), round_to_bf16(x.high)));
}
inline void split_bf16_words(const std::uint32_t* p, Vec& even, Vec& odd) {
  const auto split = [](uint32x4_t words, float32x4_t& first, float32x4_t& second) {
    first = vreinterpretq_f32_u32(vshlq_n_u32(words, 16));
    second = vreinterpretq_f32_u32(vandq_u32(words, vdupq_n_u32(0xffff0000U)));
  };
  split(vld1q_u32(p), even.low, odd.low);
  split(vld1q_u32(p + 4), even.high, odd.high);
}
inline void widen_f16_words(const std::uint32_t* p, float* even, float* odd) {
  const uint16x8x2_t halves = vld2q_u16(reinterpret_cast<const std::uint16_t*>(p));
  store(even, widen_f16(halves.val[0]));
  store(odd, widen_f16(halves.val[1]));
}

/// out[w][lane] = rows[lane][w] for 8 words of the 16 rows.
inline void transpose_block(const std::byte* const* rows, std::int64_t byte_offset, std::uint32_t* out) {
  for (int lane = 0; lane < 16; lane += 4) {
    for (int w = 0; w < 8; w += 4) {
      uint32x4_t r[4];
      for (int x = 0; x < 4; ++x)
        r[x] =
            vreinterpretq_u32_u8(vld1q_u8(reinterpret_cast<const std::uint8_t*>(rows[lane + x] + byte_offset + w * 4)));
      const auto pairs = [](uint32x4_t x) { return vreinterpretq_u64_u32(x); };
      for (int odd = 0; odd < 2; ++odd) {
        const uint64x2_t ab = pairs(odd == 0 ? vtrn1q_u32(r[0], r[1]) : vtrn2q_u32(r[0], r[1]));
        const uint64x2_t cd = pairs(odd == 0 ? vtrn1q_u32(r[2], r[3]) : vtrn2q_u32(r[2], r[3]));
        vst1q_u32(out + (w + odd) * 16 + lane, vreinterpretq_u32_u64(vtrn1q_u64(ab, cd)));
        vst1q_u32(out + (w + odd + 2) * 16 + lane, vreinterpretq_u32_u64(vtrn2q_u64(ab, cd)));
      }
    }
  }
}
constexpr int kTransposeWords = 8;
