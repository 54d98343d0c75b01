// The compiler's vector extension, lowered to whatever the baseline has. Included by vector-inl.h.

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
