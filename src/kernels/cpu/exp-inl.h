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

/// log(1 + exp(x)) = max(x, 0) + log(1 + e), e = exp(-|x|) in [0, 1]; the logarithm is e times a polynomial of
/// degree 7. Relative error below 6e-7; 0 for -inf, NaN stays NaN.
inline Vec softplus(Vec x) {
  constexpr float log2e = 1.4426950409F;
  const Vec e = exp2(mul(at_least(x, sub(zero(), x)), set1(-log2e)));
  Vec p = set1(-8.3711526e-3F);
  for (const float c :
       {4.34939e-2F, -1.0685003e-1F, 1.7687477e-1F, -2.4474774e-1F, 3.3271928e-1F, -4.9997175e-1F, 9.9999978e-1F}) {
    p = fma(p, e, set1(c));
  }
  return fma(p, e, at_least(zero(), x));
}
