// exp2 and tanh on vectors. Included once per level.

/// 2^x for x <= 128, relative error below 3e-7; exactly 0 for x < -126.5; NaN stays NaN.
/// x = r + f with integer r: a minimax polynomial of degree 5 for 2^f, and r goes into the exponent. Adding 1.5 * 2^23
/// rounds and leaves r in the low mantissa bits; the 127 beside it is the exponent bias, so that r = -127 scales by 0.
inline Vec exp2(Vec x) {
  const Vec shift = set1(12582912.0F + 127.0F);
  x = at_least(set1(-127.0F), x);
  const Vec shifted = add(x, shift);
  const Vec f = sub(x, sub(shifted, shift));
  Vec p = set1(1.3276472e-3F);
  p = fma(p, f, set1(9.6755414e-3F));
  p = fma(p, f, set1(5.5507133e-2F));
  p = fma(p, f, set1(2.4022120e-1F));
  p = fma(p, f, set1(6.9314697e-1F));
  p = fma(p, f, set1(1.0F));
  return mul(p, bits_to_exponent(shifted));
}

/// tanh(x) = 1 - 2 / (exp(2x) + 1), absolute error below 3e-7.
inline Vec tanh(Vec x) {
  constexpr float two_log2e = 2.8853900818F;
  const Vec e = exp2(at_most(set1(120.0F), mul(x, set1(two_log2e))));
  return sub(set1(1.0F), div(set1(2.0F), add(e, set1(1.0F))));
}
