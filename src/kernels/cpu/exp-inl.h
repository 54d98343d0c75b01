// exp2 and tanh on vectors. Included once per level.

/// 2^x, relative error below 3e-7; 0 for x < -150, subnormal or 0 below -126, infinity from 128 on; NaN stays NaN.
/// A minimax polynomial of degree 5 for the power of the fraction, and the whole part goes into the exponent.
inline Vec exp2(Vec x) {
  Vec whole;
  const Vec f = fraction_of(x, whole);
  Vec p = set1(1.3276472e-3F);
  p = fma(p, f, set1(9.6755414e-3F));
  p = fma(p, f, set1(5.5507133e-2F));
  p = fma(p, f, set1(2.4022120e-1F));
  p = fma(p, f, set1(6.9314697e-1F));
  p = fma(p, f, set1(1.0F));
  return times_two_to(p, whole);
}

#if defined(TESSERA_LEVEL_BF16)
/// 2^x for results that are rounded to bf16 (relative error 2e-3): degree 3, relative error below 1.1e-4, exact at 0.
inline Vec exp2_for_bf16(Vec x) {
  Vec whole;
  const Vec f = fraction_of(x, whole);
  Vec p = set1(5.500893e-2F);
  p = fma(p, f, set1(2.4221096e-1F));
  p = fma(p, f, set1(6.9328293e-1F));
  p = fma(p, f, set1(1.0F));
  return times_two_to(p, whole);
}
#endif

/// tanh(x) = 1 - 2 / (exp(2x) + 1), absolute error below 3e-7.
inline Vec tanh(Vec x) {
  constexpr float two_log2e = 2.8853900818F;
  const Vec e = exp2(at_most(set1(120.0F), mul(x, set1(two_log2e))));
  return sub(set1(1.0F), div(set1(2.0F), add(e, set1(1.0F))));
}
