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
/// p[0] on the first half of the lanes, p[stride] on the second, where there are 16 lanes.
inline Vec spread_halves(const float* p, std::int64_t stride) {
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_broadcast_ss(p)), _mm256_broadcast_ss(p + stride), 1);
}
/// The same of f16 numbers, `stride` bytes apart.
inline Vec spread_half_numbers(const std::uint8_t* p, std::int64_t stride) {
  std::uint16_t first;
  std::uint16_t second;
  std::memcpy(&first, p, 2);
  std::memcpy(&second, p + stride, 2);
  const __m256i low = _mm256_castsi128_si256(_mm_set1_epi16(static_cast<std::int16_t>(first)));
  return _mm512_cvtph_ps(_mm256_inserti128_si256(low, _mm_set1_epi16(static_cast<std::int16_t>(second)), 1));
}
inline IntVec flip_signs(IntVec bytes) {
  return _mm512_xor_si512(bytes, _mm512_set1_epi8(static_cast<char>(0x80)));
}
/// to[i] = factor * byte i * weights[i] for eight bytes.
inline void weigh_bytes8(const std::uint8_t* bytes, float factor, const float* weights, float* to) {
  const __m256i words = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
  const __m256 numbers = _mm256_mul_ps(_mm256_cvtepi32_ps(words), _mm256_set1_ps(factor));
  _mm256_storeu_ps(to, _mm256_mul_ps(numbers, _mm256_loadu_ps(weights)));
}
/// to[i] += factor * byte i * weights[i] for eight bytes.
inline void add_weighed_bytes8(const std::uint8_t* bytes, float factor, const float* weights, float* to) {
  const __m256i words = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
  const __m256 numbers = _mm256_mul_ps(_mm256_cvtepi32_ps(words), _mm256_set1_ps(factor));
  _mm256_storeu_ps(to, _mm256_fmadd_ps(numbers, _mm256_loadu_ps(weights), _mm256_loadu_ps(to)));
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
inline Vec spread_halves(const float* p, std::int64_t) {
  return _mm256_broadcast_ss(p);
}
inline Vec spread_half_numbers(const std::uint8_t* p, std::int64_t) {
  return set1(half_to_float(static_cast<std::uint16_t>(p[0] | p[1] << 8)));
}
inline IntVec flip_signs(IntVec bytes) {
  return _mm256_xor_si256(bytes, _mm256_set1_epi8(static_cast<char>(0x80)));
}
inline void weigh_bytes8(const std::uint8_t* bytes, float factor, const float* weights, float* to) {
  const __m256i words = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
  const __m256 numbers = _mm256_mul_ps(_mm256_cvtepi32_ps(words), _mm256_set1_ps(factor));
  _mm256_storeu_ps(to, _mm256_mul_ps(numbers, _mm256_loadu_ps(weights)));
}
inline void add_weighed_bytes8(const std::uint8_t* bytes, float factor, const float* weights, float* to) {
  const __m256i words = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
  const __m256 numbers = _mm256_mul_ps(_mm256_cvtepi32_ps(words), _mm256_set1_ps(factor));
  _mm256_storeu_ps(to, _mm256_fmadd_ps(numbers, _mm256_loadu_ps(weights), _mm256_loadu_ps(to)));
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
inline Vec spread_halves(const float* p, std::int64_t) {
  return set1(*p);
}
inline Vec spread_half_numbers(const std::uint8_t* p, std::int64_t) {
  return set1(half_to_float(static_cast<std::uint16_t>(p[0] | p[1] << 8)));
}
inline IntVec flip_signs(IntVec bytes) {
  const int32x4_t signs = vreinterpretq_s32_u8(vdupq_n_u8(0x80));
  return {veorq_s32(bytes.low, signs), veorq_s32(bytes.high, signs)};
}
inline Vec bytes_as_numbers(const std::uint8_t* bytes) {
  const uint16x8_t halves = vmovl_u8(vld1_u8(bytes));
  return {vcvtq_f32_u32(vmovl_u16(vget_low_u16(halves))), vcvtq_f32_u32(vmovl_high_u16(halves))};
}
inline void weigh_bytes8(const std::uint8_t* bytes, float factor, const float* weights, float* to) {
  store(to, mul(mul(bytes_as_numbers(bytes), set1(factor)), load(weights)));
}
inline void add_weighed_bytes8(const std::uint8_t* bytes, float factor, const float* weights, float* to) {
  store(to, fma(mul(bytes_as_numbers(bytes), set1(factor)), load(weights), load(to)));
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
inline Vec spread_halves(const float* p, std::int64_t) {
  return set1(*p);
}
inline Vec spread_half_numbers(const std::uint8_t* p, std::int64_t) {
  return set1(half_to_float(static_cast<std::uint16_t>(p[0] | p[1] << 8)));
}
inline IntVec flip_signs(IntVec bytes) {
  return bytes ^ static_cast<std::int32_t>(0x80808080U);
}
inline void weigh_bytes8(const std::uint8_t* bytes, float factor, const float* weights, float* to) {
  for (int i = 0; i < 8; ++i) to[i] = factor * static_cast<float>(bytes[i]) * weights[i];
}
inline void add_weighed_bytes8(const std::uint8_t* bytes, float factor, const float* weights, float* to) {
  for (int i = 0; i < 8; ++i) to[i] += factor * static_cast<float>(bytes[i]) * weights[i];
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
