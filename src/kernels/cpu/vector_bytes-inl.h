// The vocabulary of products of bytes, one implementation per instruction set; continues vector-inl.h and is included
// after it by the texts that need it. TESSERA_LEVEL_BF16 stands for machines with VNNI.
//
// ByteProduct is a product as in product-inl.h: word i of `acc` is a 32-bit integer, to which the four products of the
// unsigned bytes of word i of `a` and the signed bytes of word i of `b` are added, exact for all values of the bytes.

#if defined(TESSERA_LEVEL_AVX512)

/// Truncates; x must fit.
inline IntVec to_int(Vec x) {
  return _mm512_cvttps_epi32(x);
}
inline IntVec sub_int(IntVec a, IntVec b) {
  return _mm512_sub_epi32(a, b);
}
inline IntVec add_int(IntVec a, IntVec b) {
  return _mm512_add_epi32(a, b);
}
/// The lowest byte of every lane.
inline void store_low_bytes(std::uint8_t* p, IntVec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
}

inline float half_to_float(std::uint16_t bits) {
  return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(bits)));
}
/// 32 bytes at p on the first half of the lanes, 32 bytes `stride` later on the second, where there are 16 lanes.
inline IntVec load_halves(const void* p, std::int64_t stride) {
  const auto* bytes = static_cast<const std::uint8_t*>(p);
  const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
  const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + stride));
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
/// 16 bytes on every four lanes: those at p, those `stride` bytes later, and so on.
inline IntVec load_quarters(const std::uint8_t* p, std::int64_t stride) {
  const auto quarter = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i * stride)); };
  const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(quarter(0)), quarter(1), 1);
  const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(quarter(2)), quarter(3), 1);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
/// 32 bytes at p on all halves.
inline IntVec repeat_half(const std::uint8_t* p) {
  return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
/// 16 bytes at p on every four lanes.
inline IntVec repeat_quarter(const std::uint8_t* p) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
/// Quarters 0 and 2 of a, then those of b; with 8 lanes, which have two quarters, 0 of a and 0 of b.
inline IntVec even_quarters(IntVec a, IntVec b) {
  return _mm512_shuffle_i32x4(a, b, 0x88);
}
/// The others.
inline IntVec odd_quarters(IntVec a, IntVec b) {
  return _mm512_shuffle_i32x4(a, b, 0xdd);
}
/// 16 more in the bytes whose bits are set in the 16-bit words at p, `stride` bytes later and so on, one per quarter.
inline IntVec add_fifth_bits(IntVec codes, const std::uint8_t* p, std::int64_t stride) {
  std::uint64_t bits = 0;
  for (int i = 0; i < 4; ++i) {
    std::uint16_t own;
    std::memcpy(&own, p + i * stride, 2);
    bits |= static_cast<std::uint64_t>(own) << 16 * i;
  }
  return _mm512_mask_add_epi8(codes, bits, codes, _mm512_set1_epi8(16));
}
/// Words of quarter k shifted to the left by first - 2 * k bits, to the right where that is negative. Only bits that
/// stay within their byte are defined.
template <int first>
inline IntVec shift_quarters(IntVec x) {
  constexpr int a = first & 31;
  constexpr int b = (first - 2) & 31;
  constexpr int c = (first - 4) & 31;
  constexpr int d = (first - 6) & 31;
  return _mm512_rolv_epi32(x, _mm512_setr_epi32(a, a, a, a, b, b, b, b, c, c, c, c, d, d, d, d));
}
/// Words shifted to the left by `first` bits, those of the second half of 16 lanes by `second`; to the right where that
/// is negative. Only bits that stay within their byte are defined.
template <int first, int second>
inline IntVec shift_halves(IntVec x) {
  constexpr int a = first & 31;
  constexpr int b = second & 31;
  return _mm512_rolv_epi32(x, _mm512_setr_epi32(a, a, a, a, a, a, a, a, b, b, b, b, b, b, b, b));
}
/// The first `count` lanes: f16 numbers `stride` bytes apart. Zeros behind.
template <int count>
inline Vec collect_half_numbers(const std::uint8_t* p, std::int64_t stride) {
  const auto number = [&](int i) {
    std::int16_t bits = 0;
    if (i < count) std::memcpy(&bits, p + i * stride, 2);
    return bits;
  };
  const auto eight = [&](int i) {
    return _mm_setr_epi16(number(i), number(i + 1), number(i + 2), number(i + 3), number(i + 4), number(i + 5),
                          number(i + 6), number(i + 7));
  };
  return _mm512_cvtph_ps(_mm256_inserti128_si256(_mm256_castsi128_si256(eight(0)), eight(8), 1));
}
/// Signed bytes as floats.
inline Vec load_signed_bytes(const std::uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
/// Every number twice.
inline Vec load_twice(const float* p) {
  const __m512i from = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  return _mm512_permutexvar_ps(from, _mm512_castps256_ps512(_mm256_loadu_ps(p)));
}
/// The number at p on all lanes from f16.
inline Vec set_half_number(const std::uint8_t* p) {
  std::int16_t bits;
  std::memcpy(&bits, p, 2);
  return _mm512_cvtph_ps(_mm256_set1_epi16(bits));
}
/// Numbers first, first + apart, ... of v on four lanes each.
template <int apart>
inline Vec spread_fours(Vec v, int first) {
  constexpr int b = apart;
  constexpr int c = 2 * apart;
  constexpr int d = 3 * apart;
  const __m512i from = _mm512_setr_epi32(0, 0, 0, 0, b, b, b, b, c, c, c, c, d, d, d, d);
  return _mm512_permutexvar_ps(_mm512_add_epi32(from, _mm512_set1_epi32(first)), v);
}
inline IntVec flip_signs(IntVec bytes) {
  return _mm512_xor_si512(bytes, _mm512_set1_epi8(static_cast<char>(0x80)));
}
/// Number `first` of v on the first half of the lanes, number first + apart on the second, where there are 16 lanes.
template <int apart>
inline Vec spread_two(Vec v, int first) {
  const __m512i from =
      _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, apart, apart, apart, apart, apart, apart, apart, apart);
  return _mm512_permutexvar_ps(_mm512_add_epi32(from, _mm512_set1_epi32(first)), v);
}
/// The 6-bit scales and minima of eight groups in 12 bytes at p, as bytes. Out of general registers: the units of
/// vectors are what a product is short of.
inline __m128i spread_factors16(const std::uint8_t* p) {
  constexpr std::uint64_t six_bits = 0x3f3f3f3f3f3f3f3fU;
  std::uint64_t low;
  std::uint32_t third;
  std::memcpy(&low, p, 8);
  std::memcpy(&third, p + 8, 4);
  const std::uint64_t nibbles = third | std::uint64_t{third >> 4} << 32;
  const std::uint64_t first = low & six_bits;
  const std::uint64_t second = (nibbles & 0x0f0f0f0f0f0f0f0fU) | (low & ~six_bits) >> 2;
  return _mm_unpacklo_epi32(_mm_cvtsi64_si128(static_cast<std::int64_t>(first)),
                            _mm_cvtsi64_si128(static_cast<std::int64_t>(second)));
}
/// The scales of eight groups of a K block times weights[0, 8), and their minima times weights[8, 16). The block begins
/// with its own scale and that of the minima as f16 and goes on with 12 bytes as above.
struct GroupFactors {
  Vec scales;  ///< the minima on the second half
};
inline GroupFactors weigh_groups(const std::uint8_t* p, const float* weights) {
  const __m512 factors = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(spread_factors16(p + 4)));
  const __m512i halves = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  const __m128 both = _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m512 own = _mm512_permutexvar_ps(halves, _mm512_castps128_ps512(both));
  return {_mm512_mul_ps(_mm512_mul_ps(factors, _mm512_loadu_ps(weights)), own)};
}
/// Adds minima to sums of which only drop_scales() makes something.
inline Vec add_minima(Vec sum, GroupFactors factors) {
  return _mm512_add_ps(sum, factors.scales);
}
inline Vec drop_scales(Vec sum) {
  return _mm512_maskz_mov_ps(0xff00, sum);
}
/// p[0] on the first `lanes` lanes, p[1] on the next, and so on. 8 or 4 lanes.
template <int lanes>
inline Vec spread_lanes(const float* p) {
  if constexpr (lanes == 8) {
    const __m512i from = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    const __m128 two = _mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return _mm512_permutexvar_ps(from, _mm512_castps128_ps512(two));
  } else {
    const __m512i from = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_permutexvar_ps(from, _mm512_castps128_ps512(_mm_loadu_ps(p)));
  }
}

/// The words of a product as integers.
inline IntVec to_words(Vec x) {
  return _mm512_castps_si512(x);
}
struct ByteProduct {
  static constexpr int keys_per_word = 4;
  static Vec multiply_add(Vec a, Vec b, Vec acc) {
#if defined(TESSERA_LEVEL_BF16)
    return _mm512_castsi512_ps(_mm512_dpbusd_epi32(to_words(acc), to_words(a), to_words(b)));
#else
    // Bytes at even and at odd places as 16-bit numbers, whose products of pairs are exact. What belongs to one operand
    // is worked out once for all the products that it takes part in.
    const __m512i low = _mm512_set1_epi16(0xff);
    const __m512i b_even = _mm512_srai_epi16(_mm512_slli_epi16(to_words(b), 8), 8);
    const __m512i even = _mm512_madd_epi16(_mm512_and_si512(to_words(a), low), b_even);
    const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(to_words(a), 8), _mm512_srai_epi16(to_words(b), 8));
    return _mm512_castsi512_ps(_mm512_add_epi32(to_words(acc), _mm512_add_epi32(even, odd)));
#endif
  }
};

#elif defined(TESSERA_LEVEL_AVX2)

inline IntVec to_int(Vec x) {
  return _mm256_cvttps_epi32(x);
}
inline IntVec sub_int(IntVec a, IntVec b) {
  return _mm256_sub_epi32(a, b);
}
inline IntVec add_int(IntVec a, IntVec b) {
  return _mm256_add_epi32(a, b);
}
inline void store_low_bytes(std::uint8_t* p, IntVec x) {
  const __m256i low = _mm256_and_si256(x, _mm256_set1_epi32(0xff));
  const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(halves, halves));
}
inline float half_to_float(std::uint16_t bits) {
  return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(bits)));
}
inline IntVec load_halves(const void* p, std::int64_t) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
inline IntVec load_quarters(const std::uint8_t* p, std::int64_t stride) {
  const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + stride));
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}
inline IntVec repeat_half(const std::uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline IntVec repeat_quarter(const std::uint8_t* p) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline IntVec even_quarters(IntVec a, IntVec b) {
  return _mm256_permute2x128_si256(a, b, 0x20);
}
inline IntVec odd_quarters(IntVec a, IntVec b) {
  return _mm256_permute2x128_si256(a, b, 0x31);
}
inline IntVec add_fifth_bits(IntVec codes, const std::uint8_t* p, std::int64_t stride) {
  std::uint16_t words[2];
  std::memcpy(words, p, 2);
  std::memcpy(words + 1, p + stride, 2);
  const int bits = static_cast<int>(words[0] | static_cast<std::uint32_t>(words[1]) << 16);
  // Byte i of the lanes is byte i / 8 of the bits; bit i % 8 of it decides.
  const __m256i from = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i own = _mm256_set1_epi64x(static_cast<std::int64_t>(0x8040201008040201U));
  const __m256i bytes = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), from), own);
  return _mm256_or_si256(codes, _mm256_and_si256(_mm256_cmpeq_epi8(bytes, own), _mm256_set1_epi8(16)));
}
template <int first>
inline IntVec shift_quarters(IntVec x) {
  if constexpr (first >= 2) {
    return _mm256_sllv_epi32(x,
                             _mm256_setr_epi32(first, first, first, first, first - 2, first - 2, first - 2, first - 2));
  } else {
    static_assert(first <= 0);
    constexpr int a = -first;
    return _mm256_srlv_epi32(x, _mm256_setr_epi32(a, a, a, a, a + 2, a + 2, a + 2, a + 2));
  }
}
template <int first, int second>
inline IntVec shift_halves(IntVec x) {
  return first >= 0 ? _mm256_slli_epi32(x, first < 0 ? 0 : first) : _mm256_srli_epi32(x, first < 0 ? -first : 0);
}
template <int count>
inline Vec collect_half_numbers(const std::uint8_t* p, std::int64_t stride) {
  const auto number = [&](int i) {
    std::int16_t bits = 0;
    if (i < count) std::memcpy(&bits, p + i * stride, 2);
    return bits;
  };
  return _mm256_cvtph_ps(
      _mm_setr_epi16(number(0), number(1), number(2), number(3), number(4), number(5), number(6), number(7)));
}
inline Vec load_signed_bytes(const std::uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline Vec load_twice(const float* p) {
  const __m256 four = _mm256_castps128_ps256(_mm_loadu_ps(p));
  return _mm256_permutevar8x32_ps(four, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
}
inline Vec set_half_number(const std::uint8_t* p) {
  return set1(half_to_float(static_cast<std::uint16_t>(p[0] | p[1] << 8)));
}
template <int apart>
inline Vec spread_fours(Vec v, int first) {
  const __m256i from = _mm256_setr_epi32(0, 0, 0, 0, apart, apart, apart, apart);
  return _mm256_permutevar8x32_ps(v, _mm256_add_epi32(from, _mm256_set1_epi32(first)));
}
inline Vec spread_half_numbers(const std::uint8_t* p, std::int64_t) {
  return set1(half_to_float(static_cast<std::uint16_t>(p[0] | p[1] << 8)));
}
inline IntVec flip_signs(IntVec bytes) {
  return _mm256_xor_si256(bytes, _mm256_set1_epi8(static_cast<char>(0x80)));
}
template <int apart>
inline Vec spread_two(Vec v, int first) {
  return _mm256_permutevar8x32_ps(v, _mm256_set1_epi32(first));
}
inline __m128i spread_factors16(const std::uint8_t* p) {
  const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m128i low = _mm_and_si128(words, _mm_set1_epi8(0x3f));
  const __m128i third = _mm_srlv_epi32(_mm_shuffle_epi32(words, 0xaa), _mm_setr_epi32(0, 4, 0, 4));
  const __m128i high = _mm_or_si128(_mm_and_si128(third, _mm_set1_epi8(0x0f)),
                                    _mm_and_si128(_mm_srli_epi32(words, 2), _mm_set1_epi8(0x30)));
  return _mm_unpacklo_epi32(low, high);
}
struct GroupFactors {
  Vec scales;
  Vec minima;
};
inline GroupFactors weigh_groups(const std::uint8_t* p, const float* weights) {
  const __m128i bytes = spread_factors16(p + 4);
  const __m256 own = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
  const __m256 least = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_unpackhi_epi64(bytes, bytes)));
  return {mul(mul(own, load(weights)), spread_half_numbers(p, 0)),
          mul(mul(least, load(weights + 8)), spread_half_numbers(p + 2, 0))};
}
inline Vec add_minima(Vec sum, GroupFactors factors) {
  return add(sum, factors.minima);
}
inline Vec drop_scales(Vec sum) {
  return sum;
}
template <int lanes>
inline Vec spread_lanes(const float* p) {
  if constexpr (lanes == 8) {
    return _mm256_broadcast_ss(p);
  } else {
    const __m128 two = _mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(two), _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
  }
}
inline IntVec to_words(Vec x) {
  return _mm256_castps_si256(x);
}
struct ByteProduct {
  static constexpr int keys_per_word = 4;
  static Vec multiply_add(Vec a, Vec b, Vec acc) {
    const __m256i low = _mm256_set1_epi16(0xff);
    const __m256i b_even = _mm256_srai_epi16(_mm256_slli_epi16(to_words(b), 8), 8);
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(to_words(a), low), b_even);
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(to_words(a), 8), _mm256_srai_epi16(to_words(b), 8));
    return _mm256_castsi256_ps(_mm256_add_epi32(to_words(acc), _mm256_add_epi32(even, odd)));
  }
};

#elif defined(TESSERA_LEVEL_NEON)

inline IntVec to_int(Vec x) {
  return {vcvtq_s32_f32(x.low), vcvtq_s32_f32(x.high)};
}
inline IntVec sub_int(IntVec a, IntVec b) {
  return {vsubq_s32(a.low, b.low), vsubq_s32(a.high, b.high)};
}
inline IntVec add_int(IntVec a, IntVec b) {
  return {vaddq_s32(a.low, b.low), vaddq_s32(a.high, b.high)};
}
inline void store_low_bytes(std::uint8_t* p, IntVec x) {
  const int16x8_t halves = vcombine_s16(vmovn_s32(x.low), vmovn_s32(x.high));
  vst1_u8(p, vreinterpret_u8_s8(vmovn_s16(halves)));
}
inline float half_to_float(std::uint16_t bits) {
  return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(bits))), 0);
}
inline IntVec load_halves(const void* p, std::int64_t) {
  const auto* bytes = static_cast<const std::uint8_t*>(p);
  return {vreinterpretq_s32_u8(vld1q_u8(bytes)), vreinterpretq_s32_u8(vld1q_u8(bytes + 16))};
}
inline IntVec load_quarters(const std::uint8_t* p, std::int64_t stride) {
  return {vreinterpretq_s32_u8(vld1q_u8(p)), vreinterpretq_s32_u8(vld1q_u8(p + stride))};
}
inline IntVec repeat_half(const std::uint8_t* p) {
  return load_halves(p, 0);
}
inline IntVec repeat_quarter(const std::uint8_t* p) {
  return load_quarters(p, 0);
}
inline IntVec even_quarters(IntVec a, IntVec b) {
  return {a.low, b.low};
}
inline IntVec odd_quarters(IntVec a, IntVec b) {
  return {a.high, b.high};
}
inline IntVec add_fifth_bits(IntVec codes, const std::uint8_t* p, std::int64_t stride) {
  // Byte i of a quarter belongs to bit i % 8 of byte i / 8 of its word.
  const uint8x8_t eight = vcreate_u8(0x8040201008040201U);
  const uint8x16_t own = vcombine_u8(eight, eight);
  const auto fifth = [&](const std::uint8_t* two) {
    const uint8x16_t bits = vtstq_u8(vcombine_u8(vdup_n_u8(two[0]), vdup_n_u8(two[1])), own);
    return vreinterpretq_s32_u8(vandq_u8(bits, vdupq_n_u8(16)));
  };
  return {vorrq_s32(codes.low, fifth(p)), vorrq_s32(codes.high, fifth(p + stride))};
}
template <int first>
inline IntVec shift_quarters(IntVec x) {
  // Negative: to the right.
  return {vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(x.low), vdupq_n_s32(first))),
          vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(x.high), vdupq_n_s32(first - 2)))};
}
template <int first, int second>
inline IntVec shift_halves(IntVec x) {
  const int32x4_t bits = vdupq_n_s32(first);  // negative: to the right
  return {vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(x.low), bits)),
          vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(x.high), bits))};
}
template <int count>
inline Vec collect_half_numbers(const std::uint8_t* p, std::int64_t stride) {
  std::uint16_t numbers[kLanes] = {};
  for (int i = 0; i < count; ++i) std::memcpy(numbers + i, p + i * stride, 2);
  const float16x8_t halves = vreinterpretq_f16_u16(vld1q_u16(numbers));
  return {vcvt_f32_f16(vget_low_f16(halves)), vcvt_high_f32_f16(halves)};
}
inline Vec load_signed_bytes(const std::uint8_t* p) {
  const int16x8_t numbers = vmovl_s8(vreinterpret_s8_u8(vld1_u8(p)));
  return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(numbers))), vcvtq_f32_s32(vmovl_high_s16(numbers))};
}
inline Vec load_twice(const float* p) {
  const float32x4_t four = vld1q_f32(p);
  return {vzip1q_f32(four, four), vzip2q_f32(four, four)};
}
inline Vec set_half_number(const std::uint8_t* p) {
  return set1(half_to_float(static_cast<std::uint16_t>(p[0] | p[1] << 8)));
}
template <int apart>
inline Vec spread_fours(Vec v, int first) {
  float numbers[kLanes];
  store(numbers, v);
  return {vdupq_n_f32(numbers[first]), vdupq_n_f32(numbers[first + apart])};
}
inline Vec spread_half_numbers(const std::uint8_t* p, std::int64_t) {
  return set1(half_to_float(static_cast<std::uint16_t>(p[0] | p[1] << 8)));
}
inline IntVec flip_signs(IntVec bytes) {
  const int32x4_t signs = vreinterpretq_s32_u8(vdupq_n_u8(0x80));
  return {veorq_s32(bytes.low, signs), veorq_s32(bytes.high, signs)};
}
template <int apart>
inline Vec spread_two(Vec v, int first) {
  float numbers[kLanes];
  store(numbers, v);
  return set1(numbers[first]);
}
struct GroupFactors {
  Vec scales;
  Vec minima;
};
inline GroupFactors weigh_groups(const std::uint8_t* p, const float* weights) {
  float own[kLanes];
  float least[kLanes];
  for (int i = 0; i < 4; ++i) {
    own[i] = static_cast<float>(p[4 + i] & 63);
    own[4 + i] = static_cast<float>((p[12 + i] & 15) | (p[4 + i] >> 6) << 4);
    least[i] = static_cast<float>(p[8 + i] & 63);
    least[4 + i] = static_cast<float>(p[12 + i] >> 4 | (p[8 + i] >> 6) << 4);
  }
  return {mul(mul(load(own), load(weights)), spread_half_numbers(p, 0)),
          mul(mul(load(least), load(weights + 8)), spread_half_numbers(p + 2, 0))};
}
inline Vec add_minima(Vec sum, GroupFactors factors) {
  return add(sum, factors.minima);
}
inline Vec drop_scales(Vec sum) {
  return sum;
}
template <int lanes>
inline Vec spread_lanes(const float* p) {
  return {vdupq_n_f32(p[0]), vdupq_n_f32(p[lanes == 8 ? 0 : 1])};
}
inline IntVec to_words(Vec x) {
  return {vreinterpretq_s32_f32(x.low), vreinterpretq_s32_f32(x.high)};
}
struct ByteProduct {
  static constexpr int keys_per_word = 4;
  static Vec multiply_add(Vec a, Vec b, Vec acc) {
    const IntVec sum = multiply_add_bytes<true>(to_words(a), to_words(b), to_words(acc));
    return {vreinterpretq_f32_s32(sum.low), vreinterpretq_f32_s32(sum.high)};
  }
};

#else  // portable

inline IntVec to_int(Vec x) {
  return __builtin_convertvector(x, IntVec);
}
inline IntVec sub_int(IntVec a, IntVec b) {
  return a - b;
}
inline IntVec add_int(IntVec a, IntVec b) {
  return a + b;
}
inline void store_low_bytes(std::uint8_t* p, IntVec x) {
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<std::uint8_t>(x[i] & 0xff);
}
inline float half_to_float(std::uint16_t bits) {
  return f16_to_float(bits);
}
inline IntVec load_halves(const void* p, std::int64_t) {
  return load_int(static_cast<const std::int32_t*>(p));
}
inline IntVec load_quarters(const std::uint8_t* p, std::int64_t stride) {
  IntVec out;
  std::memcpy(&out, p, 16);
  std::memcpy(reinterpret_cast<std::uint8_t*>(&out) + 16, p + stride, 16);
  return out;
}
inline IntVec repeat_half(const std::uint8_t* p) {
  return load_halves(p, 0);
}
inline IntVec repeat_quarter(const std::uint8_t* p) {
  return load_quarters(p, 0);
}
inline IntVec even_quarters(IntVec a, IntVec b) {
  return IntVec{a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]};
}
inline IntVec odd_quarters(IntVec a, IntVec b) {
  return IntVec{a[4], a[5], a[6], a[7], b[4], b[5], b[6], b[7]};
}
inline IntVec add_fifth_bits(IntVec codes, const std::uint8_t* p, std::int64_t stride) {
  std::uint8_t fifth[32];
  for (int i = 0; i < 32; ++i) {
    fifth[i] = static_cast<std::uint8_t>((p[i / 16 * stride + i % 16 / 8] >> i % 8 & 1) << 4);
  }
  return codes | load_int(reinterpret_cast<const std::int32_t*>(fifth));
}
template <int first>
inline IntVec shift_quarters(IntVec x) {
  IntVec out{};
  for (int i = 0; i < kLanes; ++i) {
    const int left = first - i / 4 * 2;
    const auto word = static_cast<std::uint32_t>(x[i]);
    out[i] = static_cast<std::int32_t>(left >= 0 ? word << left : word >> -left);
  }
  return out;
}
template <int first, int second>
inline IntVec shift_halves(IntVec x) {
  return first >= 0 ? shift_left<(first < 0 ? 0 : first)>(x) : shift_right<(first < 0 ? -first : 0)>(x);
}
template <int count>
inline Vec collect_half_numbers(const std::uint8_t* p, std::int64_t stride) {
  Vec out{};
  for (int i = 0; i < count; ++i) {
    out[i] = half_to_float(static_cast<std::uint16_t>(p[i * stride] | p[i * stride + 1] << 8));
  }
  return out;
}
inline Vec load_signed_bytes(const std::uint8_t* p) {
  Vec out{};
  for (int i = 0; i < kLanes; ++i) out[i] = static_cast<float>(static_cast<std::int8_t>(p[i]));
  return out;
}
inline Vec load_twice(const float* p) {
  return Vec{p[0], p[0], p[1], p[1], p[2], p[2], p[3], p[3]};
}
inline Vec set_half_number(const std::uint8_t* p) {
  return set1(half_to_float(static_cast<std::uint16_t>(p[0] | p[1] << 8)));
}
template <int apart>
inline Vec spread_fours(Vec v, int first) {
  Vec out{};
  for (int i = 0; i < kLanes; ++i) out[i] = v[first + i / 4 * apart];
  return out;
}
inline Vec spread_half_numbers(const std::uint8_t* p, std::int64_t) {
  return set1(half_to_float(static_cast<std::uint16_t>(p[0] | p[1] << 8)));
}
inline IntVec flip_signs(IntVec bytes) {
  return bytes ^ static_cast<std::int32_t>(0x80808080U);
}
template <int apart>
inline Vec spread_two(Vec v, int first) {
  return set1(v[first]);
}
struct GroupFactors {
  Vec scales;
  Vec minima;
};
inline GroupFactors weigh_groups(const std::uint8_t* p, const float* weights) {
  GroupFactors factors{mul(load(weights), spread_half_numbers(p, 0)),
                       mul(load(weights + 8), spread_half_numbers(p + 2, 0))};
  for (int i = 0; i < 4; ++i) {
    factors.scales[i] *= static_cast<float>(p[4 + i] & 63);
    factors.scales[4 + i] *= static_cast<float>((p[12 + i] & 15) | (p[4 + i] >> 6) << 4);
    factors.minima[i] *= static_cast<float>(p[8 + i] & 63);
    factors.minima[4 + i] *= static_cast<float>(p[12 + i] >> 4 | (p[8 + i] >> 6) << 4);
  }
  return factors;
}
inline Vec add_minima(Vec sum, GroupFactors factors) {
  return add(sum, factors.minima);
}
inline Vec drop_scales(Vec sum) {
  return sum;
}
template <int lanes>
inline Vec spread_lanes(const float* p) {
  Vec out{};
  for (int i = 0; i < kLanes; ++i) out[i] = p[i / lanes];
  return out;
}
inline IntVec to_words(Vec x) {
  return reinterpret_cast<IntVec>(x);
}
struct ByteProduct {
  static constexpr int keys_per_word = 4;
  static Vec multiply_add(Vec a, Vec b, Vec acc) {
    const IntVec u = to_words(a);
    const IntVec s = to_words(b);
    const IntVec first = (u & 0xff) * (s << 24 >> 24) + (u >> 8 & 0xff) * (s << 16 >> 24);
    const IntVec second = (u >> 16 & 0xff) * (s << 8 >> 24) + (u >> 24 & 0xff) * (s >> 24);
    return reinterpret_cast<Vec>(to_words(acc) + (first + second));
  }
};

#endif
