// The vector vocabulary of the kernel text, one file per instruction set. Included once per level_<isa>.cpp, inside its
// anonymous namespace; TESSERA_LEVEL_AVX512 / TESSERA_LEVEL_AVX2 / TESSERA_LEVEL_NEON choose, none means portable.
//
// A "word" is 32 bits: one float, or two 16-bit numbers that lie next to each other.

#if defined(TESSERA_LEVEL_AVX512)
#include "kernels/cpu/vector_avx512-inl.h"
#elif defined(TESSERA_LEVEL_AVX2)
#include "kernels/cpu/vector_avx2-inl.h"
#elif defined(TESSERA_LEVEL_NEON)
#include "kernels/cpu/vector_neon-inl.h"
#else
#include "kernels/cpu/vector_portable-inl.h"
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
