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

#if defined(TESSERA_LEVEL_AVX512)
/// Coefficients times the powers 2^(i / roots), and 2^(1 / roots).
template <int roots>
using ScaledRoots = std::array<float, roots>;
template <int roots>
constexpr double kRoot = roots == 16 ? 1.0442737824274138 : 1.0218971486541167;

template <int roots>
constexpr ScaledRoots<roots> scaled_roots(double coefficient) {
  ScaledRoots<roots> scaled{};
  for (float& value : scaled) {
    value = static_cast<float>(coefficient);
    coefficient *= kRoot<roots>;
  }
  return scaled;
}

/// 2^x by a polynomial, highest power first, of the distance to the nearest multiple of 1 / roots. Its coefficients are
/// looked up with the power of that multiple in them: looking up runs beside the multiplications of a product, which
/// keep their ports busy, and two or three multiplications are saved. Limits as of exp2_by_polynomial.
template <int roots, class... Coefficients>
inline Vec exp2_by_roots(Vec x, const ScaledRoots<roots>& highest, const Coefficients&... rest) {
  Vec multiple;
  const Vec f = fraction_of_root<roots>(x, multiple);
  const IntVec root = root_of<roots>(multiple);
  Vec p = look_up<roots>(highest.data(), root);
  ((p = fma(p, f, look_up<roots>(rest.data(), root))), ...);
  return times_two_to(p, multiple);
}

/// 2^x in the shadow of a product: degree 2, relative error below 6e-7, exact at 0.
inline Vec exp2_beside_product(Vec x) {
  alignas(64) static constexpr auto square = scaled_roots<16>(0.2402265069591007);
  alignas(64) static constexpr auto linear = scaled_roots<16>(0.6931877329832838);
  alignas(64) static constexpr auto constant = scaled_roots<16>(1.0);
  return exp2_by_roots<16>(x, square, linear, constant);
}
#else
inline Vec exp2_beside_product(Vec x) {
  return exp2(x);
}
#endif

#if defined(TESSERA_LEVEL_BF16)
/// 2^x for results that are rounded to bf16 (relative error 2e-3): degree 1, relative error below 4e-5 and 0 on
/// average, so that sums are better than their terms. Around whole numbers the line is exact at 0 instead (6e-5).
inline Vec exp2_for_bf16(Vec x) {
  alignas(64) static constexpr auto linear = scaled_roots<32>(0.6931471805599453);
  alignas(64) static constexpr auto constant = [] {
    auto scaled = scaled_roots<32>(1.0 + 0.2402265069591007 / (3 * 64 * 64));
    scaled[0] = 1.0F;
    return scaled;
  }();
  return exp2_by_roots<32>(x, linear, constant);
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
