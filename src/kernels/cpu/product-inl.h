// The register-blocked product under every score and every output. Included once per level.
//
// acc[row][column] += sum over steps of a[row][step] * b[step][column]: `a` is read one word at a time and broadcast,
// `b` comes as panels of 16 columns per step. Scores: a = queries, steps = words of head_dim, b = key panels. Outputs:
// a = probabilities, steps = keys, b = value panels.

/// A word is one float.
struct FloatProduct {
  static constexpr int keys_per_word = 1;
  static Vec multiply_add(Vec a, Vec b, Vec acc) { return fma(a, b, acc); }
};

#if defined(TESSERA_LEVEL_BF16)
/// A word is a pair of bf16; products are exact in float, sums are float.
struct PairProduct {
  static constexpr int keys_per_word = 2;
  static Vec multiply_add(Vec a, Vec b, Vec acc) {
    return _mm512_dpbf16_ps(acc, std::bit_cast<__m512bh>(a), std::bit_cast<__m512bh>(b));
  }
};
#endif

// Rows x panels held in registers: 6 x 4 of 32 registers, 6 x 2 of 16 or of 32 halves, 2 x 4 of 16 halves.
#if defined(TESSERA_LEVEL_AVX512)
constexpr int kRegisterRows = 6;
constexpr int kRegisterPanels = 4;
#elif defined(TESSERA_LEVEL_AVX2) || defined(TESSERA_LEVEL_NEON)
constexpr int kRegisterRows = 6;
constexpr int kRegisterPanels = 1;
#else
constexpr int kRegisterRows = 2;
constexpr int kRegisterPanels = 1;
#endif

/// Whether something else may run in the shadow of a product, between its steps. Products of 16 registers use them all:
/// making room costs more than is hidden.
#if defined(TESSERA_LEVEL_AVX512)
constexpr bool kShadow = true;
#else
constexpr bool kShadow = false;
#endif

/// Steps of a product between two steps of what runs in its shadow: often enough for the exponentials of a stage, which
/// pairs, with half the steps of floats, need twice as often.
#if defined(TESSERA_EMULATE_AVX512)
template <class Product>
constexpr int kShadowSteps = 1;  // eight copies of every emulated product take the compiler minutes
#else
template <class Product>
constexpr int kShadowSteps = Product::keys_per_word == 1 ? 8 : 4;
#endif

template <class Product, int rows, int panels>
[[gnu::always_inline]] inline void multiply_step(Vec (&acc)[rows][panels * kVecsPer16],
                                                 const std::uint32_t* const (&a)[rows],
                                                 const std::uint32_t* const (&b)[panels], std::int64_t step) {
  Vec columns[panels * kVecsPer16];
#pragma GCC unroll 8
  for (int c = 0; c < panels * kVecsPer16; ++c) {
    columns[c] = load_words(b[c / kVecsPer16] + step * 16 + c % kVecsPer16 * kLanes);
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
    const Vec factor = broadcast_word(a[r] + step);
#pragma GCC unroll 8
    for (int c = 0; c < panels * kVecsPer16; ++c) acc[r][c] = Product::multiply_add(factor, columns[c], acc[r][c]);
  }
}

template <class Product, int rows, int panels, class Shadow>
[[gnu::always_inline]] inline void multiply_panels(Vec (&acc)[rows][panels * kVecsPer16],
                                                   const std::uint32_t* const (&a)[rows],
                                                   const std::uint32_t* const (&b)[panels], std::int64_t steps,
                                                   [[maybe_unused]] Shadow& shadow) {
  std::int64_t step = 0;
  for (; step + kShadowSteps<Product> <= steps; step += kShadowSteps<Product>) {
#pragma GCC unroll 8
    for (int s = 0; s < kShadowSteps<Product>; ++s) multiply_step<Product, rows, panels>(acc, a, b, step + s);
    if constexpr (kShadow) shadow.step();
  }
  for (int rest = static_cast<int>(steps - step); rest > 0; --rest, ++step) {
    multiply_step<Product, rows, panels>(acc, a, b, step);
  }
}

/// scores[row][group columns] = queries . keys for `panels` neighbouring groups of the block.
template <class Product, int rows, int panels, class Shadow>
[[gnu::noinline]] void score_rows(const std::uint32_t* const* q, const std::uint32_t* const* k, std::int64_t words,
                                  float* scores, Shadow& shadow) {
  Vec acc[rows][panels * kVecsPer16];
  const std::uint32_t* a[rows];
  const std::uint32_t* b[panels];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) a[r] = q[r];
#pragma GCC unroll 8
  for (int p = 0; p < panels; ++p) b[p] = k[p];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < panels * kVecsPer16; ++c) acc[r][c] = zero();
  }
  multiply_panels<Product, rows, panels>(acc, a, b, words, shadow);
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < panels * kVecsPer16; ++c) store(scores + r * kBlockKeys + c * kLanes, acc[r][c]);
  }
}

/// The groups of a block that take part in an output product.
struct ValueGroups {
  const std::uint32_t* panels[kBlockGroups];
  std::int32_t column[kBlockGroups];  ///< first key of the group within the block
  std::int32_t count;
};

/// output[row][columns of `panels` neighbouring slabs] += probabilities . values over all groups.
template <class Product, int rows, int panels, class Shadow>
[[gnu::noinline]] void output_rows(const float* probabilities, const ValueGroups& groups, std::int64_t slab,
                                   float* const* output, Shadow& shadow) {
  constexpr std::int64_t steps = kGroupKeys / Product::keys_per_word;
  Vec acc[rows][panels * kVecsPer16];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < panels * kVecsPer16; ++c) acc[r][c] = load(output[r] + slab * 16 + c * kLanes);
  }
  for (std::int32_t g = 0; g < groups.count; ++g) {
    const std::uint32_t* a[rows];
    const std::uint32_t* b[panels];
    const auto* words =
        reinterpret_cast<const std::uint32_t*>(probabilities) + groups.column[g] / Product::keys_per_word;
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) a[r] = words + r * kBlockKeys / Product::keys_per_word;
#pragma GCC unroll 8
    for (int p = 0; p < panels; ++p) b[p] = groups.panels[g] + (slab + p) * steps * 16;
    multiply_panels<Product, rows, panels>(acc, a, b, steps, shadow);
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < panels * kVecsPer16; ++c) store(output[r] + slab * 16 + c * kLanes, acc[r][c]);
  }
}

/// Calls body with `count` in [1, limit] as a compile-time constant.
template <int limit, class Body>
inline void with_count(std::int64_t count, const Body& body) {
  if constexpr (limit > 1) {
    if (count < limit) {
      with_count<limit - 1>(count, body);
      return;
    }
  }
  body(std::integral_constant<int, limit>{});
}
