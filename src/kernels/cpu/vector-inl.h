// The vector vocabulary of the kernel text, one implementation per instruction set. Included once per level_<isa>.cpp,
// inside its anonymous namespace; TESSERA_LEVEL_AVX512 / TESSERA_LEVEL_AVX2 / TESSERA_LEVEL_NEON choose, none means
// portable.
//
// A "word" is 32 bits: one float, or two 16-bit numbers that lie next to each other.

#if defined(TESSERA_LEVEL_AVX512)

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

#elif defined(TESSERA_LEVEL_AVX2)

constexpr int kLanes = 8;
using Vec = __m256;
using IntVec = __m256i;
using Mask = __m256;

inline Vec zero() {
  return _mm256_setzero_ps();
}
inline Vec set1(float x) {
  return _mm256_set1_ps(x);
}
inline Vec load(const float* p) {
  return _mm256_loadu_ps(p);
}
inline void store(float* p, Vec x) {
  _mm256_storeu_ps(p, x);
}
inline Vec load_words(const std::uint32_t* p) {
  return _mm256_castsi256_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec broadcast_word(const std::uint32_t* p) {
  return _mm256_broadcast_ss(reinterpret_cast<const float*>(p));
}
inline Vec add(Vec a, Vec b) {
  return _mm256_add_ps(a, b);
}
inline Vec sub(Vec a, Vec b) {
  return _mm256_sub_ps(a, b);
}
inline Vec mul(Vec a, Vec b) {
  return _mm256_mul_ps(a, b);
}
inline Vec div(Vec a, Vec b) {
  return _mm256_div_ps(a, b);
}
inline Vec fma(Vec a, Vec b, Vec c) {
  return _mm256_fmadd_ps(a, b, c);
}
inline Vec at_least(Vec limit, Vec x) {
  return _mm256_max_ps(limit, x);
}
inline Vec at_most(Vec limit, Vec x) {
  return _mm256_min_ps(limit, x);
}
inline Vec shift_into_exponent(Vec x) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 23));
}
inline float reduce_max(Vec x) {
  __m128 h = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  h = _mm_max_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
}
inline bool any_greater(Vec a, Vec b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
}
inline float reduce_add(Vec x) {
  __m128 h = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  h = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
}

/// out[i] = sum of the lanes of x[i].
inline void reduce_add4(const Vec (&x)[4], float* out) {
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(x[0], x[1]), _mm256_unpackhi_ps(x[0], x[1]));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(x[2], x[3]), _mm256_unpackhi_ps(x[2], x[3]));
  const __m256 all = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}

inline IntVec set1_int(std::int32_t x) {
  return _mm256_set1_epi32(x);
}
inline IntVec load_int(const std::int32_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline Vec to_float(IntVec x) {
  return _mm256_cvtepi32_ps(x);
}
template <int n>
inline IntVec shift_right(IntVec x) {
  return _mm256_srli_epi32(x, n);
}
template <int n>
inline IntVec shift_left(IntVec x) {
  return _mm256_slli_epi32(x, n);
}
inline IntVec bits_and(IntVec a, IntVec b) {
  return _mm256_and_si256(a, b);
}
inline IntVec bits_or(IntVec a, IntVec b) {
  return _mm256_or_si256(a, b);
}
inline void store_low_bytes(std::int8_t* p, Vec words) {
  const __m256i bytes = _mm256_and_si256(_mm256_castps_si256(words), _mm256_set1_epi32(255));
  const __m256i halves = _mm256_packus_epi32(bytes, bytes);
  const __m256i quarters = _mm256_packus_epi16(halves, halves);  // 4 bytes at the beginning of either half
  const __m128i joined = _mm_unpacklo_epi32(_mm256_castsi256_si128(quarters), _mm256_extracti128_si256(quarters, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), joined);
}
template <bool wide>
inline IntVec multiply_add_bytes(IntVec a, IntVec b, IntVec sum) {
  const __m256i ones = _mm256_set1_epi16(1);
  const auto products = [&](IntVec x) { return _mm256_madd_epi16(_mm256_maddubs_epi16(x, b), ones); };
  if constexpr (!wide) return _mm256_add_epi32(sum, products(a));
  const __m256i low = _mm256_set1_epi8(15);
  const __m256i high = products(bits_and(shift_right<4>(a), low));
  return _mm256_add_epi32(_mm256_add_epi32(sum, products(bits_and(a, low))), shift_left<4>(high));
}
inline Mask not_less(IntVec a, IntVec b) {
  return _mm256_castsi256_ps(_mm256_xor_si256(_mm256_cmpgt_epi32(b, a), _mm256_set1_epi32(-1)));
}
inline Mask both(Mask a, Mask b) {
  return _mm256_and_ps(a, b);
}
inline Mask mask_from_bits(std::uint32_t bits) {
  const __m256i select_bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i spread = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), select_bit);
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(spread, select_bit));
}
inline Vec select(Mask m, Vec yes, Vec no) {
  return _mm256_blendv_ps(no, yes, m);
}
/// [bits][lane]: which of the packed numbers a lane takes; any where its bit is 0.
struct ExpandTable {
  alignas(32) std::int32_t from[256][8];
  constexpr ExpandTable() : from{} {
    for (int bits = 0; bits < 256; ++bits) {
      int next = 0;
      for (int lane = 0; lane < 8; ++lane) {
        from[bits][lane] = next;
        next += bits >> lane & 1;
      }
    }
  }
};
constexpr ExpandTable kExpandTable;
inline Vec expand_lanes(Vec x, std::uint32_t bits) {
  const __m256i from = _mm256_load_si256(reinterpret_cast<const __m256i*>(kExpandTable.from[bits]));
  return _mm256_and_ps(_mm256_permutevar8x32_ps(x, _mm256_and_si256(from, _mm256_set1_epi32(7))), mask_from_bits(bits));
}

inline Vec load_bf16(const std::uint16_t* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline Vec load_f16(const std::uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store_f16(std::uint16_t* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store_bf16(std::uint16_t* p, Vec x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i fixed = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(fixed, fixed), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline void split_bf16_words(const std::uint32_t* p, Vec& even, Vec& odd) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  even = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
  odd = _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xffff0000U))));
}
inline void widen_f16_words(const std::uint32_t* p, float* even, float* odd) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i low = _mm256_and_si256(words, _mm256_set1_epi32(0xffff));
  const __m256i high = _mm256_srli_epi32(words, 16);
  const __m256i both_halves = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
  store(even, _mm256_cvtph_ps(_mm256_castsi256_si128(both_halves)));
  store(odd, _mm256_cvtph_ps(_mm256_extracti128_si256(both_halves, 1)));
}

/// out[w][lane] = rows[lane][w] for 8 words of the 16 rows.
inline void transpose_block(const std::byte* const* rows, std::int64_t byte_offset, std::uint32_t* out) {
  for (int half = 0; half < 16; half += 8) {
    __m256 r[8];
    __m256 t[8];
    for (int x = 0; x < 8; ++x) {
      r[x] = _mm256_loadu_ps(reinterpret_cast<const float*>(rows[half + x] + byte_offset));
    }
    for (int x = 0; x < 8; x += 2) {
      t[x] = _mm256_unpacklo_ps(r[x], r[x + 1]);
      t[x + 1] = _mm256_unpackhi_ps(r[x], r[x + 1]);
    }
    for (int x = 0; x < 8; x += 4) {
      r[x] = _mm256_shuffle_ps(t[x], t[x + 2], 0x44);
      r[x + 1] = _mm256_shuffle_ps(t[x], t[x + 2], 0xee);
      r[x + 2] = _mm256_shuffle_ps(t[x + 1], t[x + 3], 0x44);
      r[x + 3] = _mm256_shuffle_ps(t[x + 1], t[x + 3], 0xee);
    }
    for (int x = 0; x < 4; ++x) {
      store(reinterpret_cast<float*>(out) + x * 16 + half, _mm256_permute2f128_ps(r[x], r[x + 4], 0x20));
      store(reinterpret_cast<float*>(out) + (x + 4) * 16 + half, _mm256_permute2f128_ps(r[x], r[x + 4], 0x31));
    }
  }
}
constexpr int kTransposeWords = 8;

#elif defined(TESSERA_LEVEL_NEON)

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

#else  // portable: the compiler's vector extension, lowered to whatever the baseline has

constexpr int kLanes = 8;
using Vec = float __attribute__((vector_size(32)));
using IntVec = std::int32_t __attribute__((vector_size(32)));
using Mask = IntVec;

inline Vec set1(float x) {
  return Vec{x, x, x, x, x, x, x, x};
}
inline Vec zero() {
  return set1(0);
}
inline Vec load(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline void store(float* p, Vec x) {
  std::memcpy(p, &x, sizeof x);
}
inline Vec load_words(const std::uint32_t* p) {
  Vec x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline Vec broadcast_word(const std::uint32_t* p) {
  float x;
  std::memcpy(&x, p, sizeof x);
  return set1(x);
}
inline Vec add(Vec a, Vec b) {
  return a + b;
}
inline Vec sub(Vec a, Vec b) {
  return a - b;
}
inline Vec mul(Vec a, Vec b) {
  return a * b;
}
inline Vec div(Vec a, Vec b) {
  return a / b;
}
inline Vec fma(Vec a, Vec b, Vec c) {
  return a * b + c;
}
inline Vec select(Mask m, Vec yes, Vec no) {
  return m ? yes : no;
}
inline Vec at_least(Vec limit, Vec x) {
  return limit > x ? limit : x;
}
inline Vec at_most(Vec limit, Vec x) {
  return limit < x ? limit : x;
}
inline Vec shift_into_exponent(Vec x) {
  return reinterpret_cast<Vec>(reinterpret_cast<IntVec>(x) << 23);
}
inline bool any_greater(Vec a, Vec b) {
  bool found = false;
  for (int i = 0; i < kLanes; ++i) found = found || a[i] > b[i];
  return found;
}
inline float reduce_max(Vec x) {
  float best = x[0];
  for (int i = 1; i < kLanes; ++i) best = best > x[i] ? best : x[i];
  return best;
}
inline float reduce_add(Vec x) {
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

/// out[i] = sum of the lanes of x[i].
inline void reduce_add4(const Vec (&x)[4], float* out) {
  for (int i = 0; i < 4; ++i) out[i] = reduce_add(x[i]);
}

inline IntVec set1_int(std::int32_t x) {
  return IntVec{x, x, x, x, x, x, x, x};
}
inline IntVec load_int(const std::int32_t* p) {
  IntVec x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline Vec to_float(IntVec x) {
  return __builtin_convertvector(x, Vec);
}
template <int n>
inline IntVec shift_right(IntVec x) {
  using Unsigned = std::uint32_t __attribute__((vector_size(32)));
  return reinterpret_cast<IntVec>(reinterpret_cast<Unsigned>(x) >> n);
}
template <int n>
inline IntVec shift_left(IntVec x) {
  using Unsigned = std::uint32_t __attribute__((vector_size(32)));
  return reinterpret_cast<IntVec>(reinterpret_cast<Unsigned>(x) << n);
}
inline IntVec bits_and(IntVec a, IntVec b) {
  return a & b;
}
inline IntVec bits_or(IntVec a, IntVec b) {
  return a | b;
}
inline void store_low_bytes(std::int8_t* p, Vec words) {
  const auto bits = reinterpret_cast<IntVec>(words);
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<std::int8_t>(bits[i]);
}
template <bool wide>
inline IntVec multiply_add_bytes(IntVec a, IntVec b, IntVec sum) {
  const auto byte_product = [&](IntVec unsigned_byte, IntVec signed_top) { return unsigned_byte * (signed_top >> 24); };
  const IntVec low = set1_int(255);
  sum += byte_product(a & low, shift_left<24>(b));
  sum += byte_product(shift_right<8>(a) & low, shift_left<16>(b));
  sum += byte_product(shift_right<16>(a) & low, shift_left<8>(b));
  return sum + byte_product(shift_right<24>(a), b);
}
inline Mask not_less(IntVec a, IntVec b) {
  return a >= b;
}
inline Mask both(Mask a, Mask b) {
  return a & b;
}
inline Mask mask_from_bits(std::uint32_t bits) {
  const IntVec select_bit{1, 2, 4, 8, 16, 32, 64, 128};
  return (set1_int(static_cast<std::int32_t>(bits)) & select_bit) == select_bit;
}
inline Vec expand_lanes(Vec x, std::uint32_t bits) {
  Vec out = zero();
  for (int lane = 0, next = 0; lane < kLanes; ++lane) {
    if ((bits >> lane & 1U) != 0) out[lane] = x[next++];
  }
  return out;
}

inline Vec load_bf16(const std::uint16_t* p) {
  Vec x;
  for (int i = 0; i < kLanes; ++i) x[i] = bf16_to_float(p[i]);
  return x;
}
inline Vec load_f16(const std::uint16_t* p) {
  Vec x;
  for (int i = 0; i < kLanes; ++i) x[i] = f16_to_float(p[i]);
  return x;
}
inline void store_bf16(std::uint16_t* p, Vec x) {
  for (int i = 0; i < kLanes; ++i) p[i] = float_to_bf16(x[i]);
}
inline void store_f16(std::uint16_t* p, Vec x) {
  for (int i = 0; i < kLanes; ++i) p[i] = float_to_f16(x[i]);
}
inline void split_bf16_words(const std::uint32_t* p, Vec& even, Vec& odd) {
  const IntVec words = load_int(reinterpret_cast<const std::int32_t*>(p));
  even = reinterpret_cast<Vec>(words << 16);
  odd = reinterpret_cast<Vec>(words & set1_int(static_cast<std::int32_t>(0xffff0000U)));
}
inline void widen_f16_words(const std::uint32_t* p, float* even, float* odd) {
  for (int i = 0; i < kLanes; ++i) {
    even[i] = f16_to_float(static_cast<std::uint16_t>(p[i]));
    odd[i] = f16_to_float(static_cast<std::uint16_t>(p[i] >> 16));
  }
}
inline void transpose_block(const std::byte* const* rows, std::int64_t byte_offset, std::uint32_t* out) {
  for (int lane = 0; lane < 16; ++lane) {
    for (int w = 0; w < 8; ++w) std::memcpy(out + w * 16 + lane, rows[lane] + byte_offset + w * 4, 4);
  }
}
constexpr int kTransposeWords = 8;

#endif

#if !defined(TESSERA_LEVEL_AVX512)
/// Adding 1.5 * 2^23 rounds and leaves the integer in the low mantissa bits; the 127 beside it is the exponent bias, so
/// that shifting those bits into the exponent gives 2^whole, 0 for whole = -127, infinity for 128.
inline Vec fraction_of(Vec x, Vec& whole) {
  const Vec shift = set1(12582912.0F + 127.0F);
  x = at_most(set1(128.0F), at_least(set1(-127.0F), x));
  whole = add(x, shift);
  return sub(x, sub(whole, shift));
}
inline Vec times_two_to(Vec x, Vec whole) {
  return mul(x, shift_into_exponent(whole));
}
#endif

/// Vectors in a row of 16 numbers: keys and value columns are handled 16 at a time on every machine.
constexpr int kVecsPer16 = 16 / kLanes;
