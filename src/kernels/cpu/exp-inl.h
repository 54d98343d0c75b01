// exp2 and tanh on vectors. Included once per level.

/// 2^x: a polynomial with these coefficients, highest power first, for the power of the fraction in [-1/2, 1/2]; the
/// whole part goes into the exponent. 0 for x < -150, subnormal or 0 below -126, infinity from 128 on; NaN stays NaN.
template <class... Coefficients>
inline Vec exp2_by_polynomial(Vec x, float highest, Coefficients... rest) {
  Vec whole;
  const Vec f = fraction_of(x, whole);
  Vec p = set1(highest);
  ((p = fma(p, f, set1(rest))), ...);
  return times_two_to(p, whole);
}

/// 2^x, minimax of degree 5: relative error below 3e-7.
inline Vec exp2(Vec x) {
  return exp2_by_polynomial(x, 1.3276472e-3F, 9.6755414e-3F, 5.5507133e-2F, 2.4022120e-1F, 6.9314697e-1F, 1.0F);
}

#if defined(TESSERA_LEVEL_BF16)
/// 2^x for results that are rounded to bf16 (relative error 2e-3): degree 3, relative error below 1.1e-4, exact at 0.
inline Vec exp2_for_bf16(Vec x) {
  return exp2_by_polynomial(x, 5.500893e-2F, 2.4221096e-1F, 6.9328293e-1F, 1.0F);
}
#endif

/// tanh(x) = 1 - 2 / (exp(2x) + 1), absolute error below 3e-7.
inline Vec tanh(Vec x) {
  constexpr float two_log2e = 2.8853900818F;
  const Vec e = exp2(at_most(set1(120.0F), mul(x, set1(two_log2e))));
  return sub(set1(1.0F), div(set1(2.0F), add(e, set1(1.0F))));
}
