// 512-bit vectors: AVX-512 F, BW, DQ and VL, with bf16 products where the level has them. Included by vector-inl.h.

constexpr int kLanes = 16;
using Vec = __m512;
using IntVec = __m512i;
using Mask = __mmask16;

inline Vec zero() {
  return _mm512_setzero_ps();
}
inline Vec set1(float x) {
  return _mm512_set1_ps(x);
}
inline Vec load(const float* p) {
  return _mm512_loadu_ps(p);
}
inline void store(float* p, Vec x) {
  _mm512_storeu_ps(p, x);
}
inline Vec load_words(const std::uint32_t* p) {
  return _mm512_castsi512_ps(_mm512_loadu_si512(p));
}
inline Vec broadcast_word(const std::uint32_t* p) {
  return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(*p)));
}
inline Vec add(Vec a, Vec b) {
  return _mm512_add_ps(a, b);
}
inline Vec sub(Vec a, Vec b) {
  return _mm512_sub_ps(a, b);
}
inline Vec mul(Vec a, Vec b) {
  return _mm512_mul_ps(a, b);
}
inline Vec div(Vec a, Vec b) {
  return _mm512_div_ps(a, b);
}
inline Vec fma(Vec a, Vec b, Vec c) {
  return _mm512_fmadd_ps(a, b, c);
}
/// max(limit, x), but NaN when x is NaN.
inline Vec at_least(Vec limit, Vec x) {
  return _mm512_max_ps(limit, x);
}
inline Vec at_most(Vec limit, Vec x) {
  return _mm512_min_ps(limit, x);
}
/// x = whole + fraction, the fraction in [-1/2, 1/2]; times_two_to(p, whole) = p * 2^whole. How `whole` is written is
/// this pair's own affair. -inf has fraction 0 and scales to 0, NaN stays NaN.
inline Vec fraction_of(Vec x, Vec& whole) {
  const Vec fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT);
  whole = _mm512_sub_ps(x, fraction);
  return fraction;
}
inline Vec times_two_to(Vec x, Vec whole) {
  return _mm512_scalef_ps(x, whole);
}
/// x = multiple + fraction, a multiple of 1 / roots and a fraction of half that at most, roots being 16 or 32; root_of:
/// roots times the multiple, modulo roots, in the low bits, which are what look_up reads of an index. times_two_to
/// takes a multiple as rounded down.
template <int roots>
inline Vec fraction_of_root(Vec x, Vec& multiple) {
  const Vec fraction = _mm512_reduce_ps(x, (roots == 16 ? 4 : 5) << 4 | _MM_FROUND_TO_NEAREST_INT);
  multiple = _mm512_sub_ps(x, fraction);
  return fraction;
}
template <int roots>
inline IntVec root_of(Vec multiple) {
  constexpr float last_bit_worth_one = 12582912.0F;  // 1.5 * 2^23
  return _mm512_castps_si512(_mm512_add_ps(multiple, _mm512_set1_ps(last_bit_worth_one / roots)));
}
template <int roots>
inline Vec look_up(const float* table, IntVec index) {
  if constexpr (roots == 16) {
    return _mm512_permutexvar_ps(index, _mm512_load_ps(table));
  } else {
    return _mm512_permutex2var_ps(_mm512_load_ps(table), index, _mm512_load_ps(table + 16));
  }
}
inline float reduce_max(Vec x) {
  return _mm512_reduce_max_ps(x);
}
inline float reduce_add(Vec x) {
  return _mm512_reduce_add_ps(x);
}
inline bool any_greater(Vec a, Vec b) {
  return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0;
}

/// out[i] = sum of the lanes of x[i].
inline void reduce_add4(const Vec (&x)[4], float* out) {
  __m256 h[4];
  for (int i = 0; i < 4; ++i) h[i] = _mm256_add_ps(_mm512_castps512_ps256(x[i]), _mm512_extractf32x8_ps(x[i], 1));
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(h[0], h[1]), _mm256_unpackhi_ps(h[0], h[1]));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(h[2], h[3]), _mm256_unpackhi_ps(h[2], h[3]));
  const __m256 all = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}

inline IntVec set1_int(std::int32_t x) {
  return _mm512_set1_epi32(x);
}
inline IntVec load_int(const std::int32_t* p) {
  return _mm512_loadu_si512(p);
}
inline Vec to_float(IntVec x) {
  return _mm512_cvtepi32_ps(x);
}
template <int n>
inline IntVec shift_right(IntVec x) {
  return _mm512_srli_epi32(x, n);
}
template <int n>
inline IntVec shift_left(IntVec x) {
  return _mm512_slli_epi32(x, n);
}
inline IntVec bits_and(IntVec a, IntVec b) {
  return _mm512_and_si512(a, b);
}
inline IntVec bits_or(IntVec a, IntVec b) {
  return _mm512_or_si512(a, b);
}
/// The low byte of every word.
inline void store_low_bytes(std::int8_t* p, Vec words) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_castps_si512(words)));
}
/// sum + the four products of unsigned bytes of a and signed bytes of b in every word. `wide`: bytes of a may be above
/// 15.
template <bool wide>
inline IntVec multiply_add_bytes(IntVec a, IntVec b, IntVec sum) {
#if defined(TESSERA_LEVEL_BF16)
  return _mm512_dpbusd_epi32(sum, a, b);
#else
  const __m512i ones = _mm512_set1_epi16(1);
  const auto products = [&](IntVec x) { return _mm512_madd_epi16(_mm512_maddubs_epi16(x, b), ones); };
  if constexpr (!wide) return _mm512_add_epi32(sum, products(a));
  // Pairs of products of whole bytes would not fit into 16 bits.
  const __m512i low = _mm512_set1_epi8(15);
  const __m512i high = products(bits_and(shift_right<4>(a), low));
  return _mm512_add_epi32(_mm512_add_epi32(sum, products(bits_and(a, low))), shift_left<4>(high));
#endif
}
inline Mask not_less(IntVec a, IntVec b) {
  return _mm512_cmpge_epi32_mask(a, b);
}
inline Mask both(Mask a, Mask b) {
  return static_cast<Mask>(a & b);
}
inline Mask mask_from_bits(std::uint32_t bits) {
  return static_cast<Mask>(bits);
}
inline Vec select(Mask m, Vec yes, Vec no) {
  return _mm512_mask_blend_ps(m, no, yes);
}
/// The first numbers of x, in order, on the lanes whose bit is set; 0 on the others.
inline Vec expand_lanes(Vec x, std::uint32_t bits) {
  return _mm512_maskz_expand_ps(static_cast<Mask>(bits), x);
}

inline Vec load_bf16(const std::uint16_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline Vec load_f16(const std::uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store_f16(std::uint16_t* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store_bf16(std::uint16_t* p, Vec x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __m512i fixed = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), rounded, quiet);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(fixed, 16)));
}
/// Words of two bf16 -> the numbers at even and at odd places.
inline void split_bf16_words(const std::uint32_t* p, Vec& even, Vec& odd) {
  const __m512i words = _mm512_loadu_si512(p);
  even = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
  odd = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000U))));
}
inline void widen_f16_words(const std::uint32_t* p, float* even, float* odd) {
  const __m512i words = _mm512_loadu_si512(p);
  store(even, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(words)));
  store(odd, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(words, 16))));
}

/// out[w][lane] = rows[lane][w] for 16 rows and 16 words.
inline void transpose_block(const std::byte* const* rows, std::int64_t byte_offset, std::uint32_t* out) {
  __m512i r[16];
  __m512i t[16];
  for (int x = 0; x < 16; ++x) r[x] = _mm512_loadu_si512(rows[x] + byte_offset);
  for (int x = 0; x < 16; x += 2) {
    t[x] = _mm512_unpacklo_epi32(r[x], r[x + 1]);
    t[x + 1] = _mm512_unpackhi_epi32(r[x], r[x + 1]);
  }
  for (int x = 0; x < 16; x += 4) {
    r[x] = _mm512_unpacklo_epi64(t[x], t[x + 2]);
    r[x + 1] = _mm512_unpackhi_epi64(t[x], t[x + 2]);
    r[x + 2] = _mm512_unpacklo_epi64(t[x + 1], t[x + 3]);
    r[x + 3] = _mm512_unpackhi_epi64(t[x + 1], t[x + 3]);
  }
  for (int x = 0; x < 4; ++x) {
    t[x] = _mm512_shuffle_i32x4(r[x], r[x + 4], 0x88);
    t[x + 4] = _mm512_shuffle_i32x4(r[x], r[x + 4], 0xdd);
    t[x + 8] = _mm512_shuffle_i32x4(r[x + 8], r[x + 12], 0x88);
    t[x + 12] = _mm512_shuffle_i32x4(r[x + 8], r[x + 12], 0xdd);
  }
  for (int x = 0; x < 4; ++x) {
    _mm512_storeu_si512(out + x * 16, _mm512_shuffle_i32x4(t[x], t[x + 8], 0x88));
    _mm512_storeu_si512(out + (x + 8) * 16, _mm512_shuffle_i32x4(t[x], t[x + 8], 0xdd));
    _mm512_storeu_si512(out + (x + 4) * 16, _mm512_shuffle_i32x4(t[x + 4], t[x + 12], 0x88));
    _mm512_storeu_si512(out + (x + 12) * 16, _mm512_shuffle_i32x4(t[x + 4], t[x + 12], 0xdd));
  }
}
constexpr int kTransposeWords = 16;

#if defined(TESSERA_LEVEL_BF16)
/// Two vectors rounded to bf16, each to a place of its own; and side by side, word i = (first[i], second[i]).
inline void store_bf16_two(std::uint16_t* first_to, std::uint16_t* second_to, Vec first, Vec second) {
  const __m512i halves = std::bit_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(first_to), _mm512_castsi512_si256(halves));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(second_to), _mm512_extracti64x4_epi64(halves, 1));
}
inline void store_bf16_words(std::uint32_t* to, Vec first, Vec second) {
  const __m512i halves = std::bit_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
  const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(halves));
  const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(halves, 1));
  _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}
/// 16 words of two halves -> the 16 first halves and the 16 second halves.
inline void split_halves(const std::uint32_t* words, std::uint32_t* first, std::uint32_t* second) {
  const __m512i x = _mm512_loadu_si512(words);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(first), _mm512_cvtepi32_epi16(x));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(second), _mm512_cvtepi32_epi16(_mm512_srli_epi32(x, 16)));
}
#endif
