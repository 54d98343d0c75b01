// 256-bit vectors: AVX2, FMA and F16C. Included by vector-inl.h.

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
