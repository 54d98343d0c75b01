// What the machine can do at best: a product loop that lives in registers and a read of a large buffer. Every fraction
// of a peak that the benchmarks print is measured against these in the same run. Included once per level.

template <class Product>
double product_rounds(std::int64_t iterations, float* sink) {
#if defined(TESSERA_LEVEL_AVX512)
  constexpr int chains = 24;
#elif defined(TESSERA_LEVEL_AVX2) || defined(TESSERA_LEVEL_NEON)
  constexpr int chains = 12;
#else
  constexpr int chains = 6;
#endif
  Vec acc[chains];
  const std::uint32_t word = Product::keys_per_word == 2 ? 0x3f803f80U : std::bit_cast<std::uint32_t>(1.0F);
  const Vec a = broadcast_word(&word);
  Vec b = a;
  // Different starts, or the compiler would see that all chains compute the same and keep one.
#pragma GCC unroll 24
  for (int c = 0; c < chains; ++c) acc[c] = set1(static_cast<float>(c));
  for (std::int64_t i = 0; i < iterations; ++i) {
    // Keeps the loop from being folded.
#if (defined(TESSERA_LEVEL_AVX512) || defined(TESSERA_LEVEL_AVX2)) && !defined(TESSERA_EMULATE_AVX512)
    asm volatile("" : "+x"(b));
#elif defined(TESSERA_LEVEL_NEON)
    asm volatile("" : "+w"(b.low), "+w"(b.high));
#else
    asm volatile("" : "+m"(b));
#endif
#pragma GCC unroll 24
    for (Vec& chain : acc) chain = Product::multiply_add(a, b, chain);
  }
  Vec total = zero();
  for (const Vec& chain : acc) total = add(total, chain);
  *sink = reduce_add(total);
  return 2.0 * static_cast<double>(iterations) * chains * kLanes * Product::keys_per_word;
}

double product_loop(std::int64_t iterations, bool pairs, float* sink) {
#if defined(TESSERA_LEVEL_BF16)
  if (pairs) return product_rounds<PairProduct>(iterations, sink);
#endif
  (void)pairs;
  return product_rounds<FloatProduct>(iterations, sink);
}

float read_loop(const float* data, std::int64_t count) {
  Vec acc[4] = {zero(), zero(), zero(), zero()};
  for (std::int64_t i = 0; i + 4 * kLanes <= count; i += 4 * kLanes) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) acc[c] = add(acc[c], load(data + i + c * kLanes));
  }
  return reduce_add(add(add(acc[0], acc[1]), add(acc[2], acc[3])));
}
