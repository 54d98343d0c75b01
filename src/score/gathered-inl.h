// The kernel text of gathered_scores.h, on the vector vocabulary of the attention kernels. Included once per
// instruction set.

#include "kernels/cpu/vector-inl.h"
//
#include "kernels/cpu/product-inl.h"

// Keys in registers at a time, with one panel of queries and with several.
#if defined(TESSERA_LEVEL_AVX512)
constexpr int kGatheredRows = 8;
constexpr int kGatheredPanels = 4;
#elif defined(TESSERA_LEVEL_AVX2) || defined(TESSERA_LEVEL_NEON)
constexpr int kGatheredRows = 6;
constexpr int kGatheredPanels = 1;
#else
constexpr int kGatheredRows = 2;
constexpr int kGatheredPanels = 1;
#endif

/// Products of `rows` keys with `panels` panels of queries folded into the largest of each lane. `undefined` becomes
/// NaN where a product is NaN or infinite.
template <class Product, int rows, int panels>
[[gnu::always_inline]] inline void fold_products(const std::uint32_t* const (&a)[rows], const std::uint32_t* queries,
                                                 std::int64_t words, Vec (&best)[rows], Vec& undefined) {
  const std::uint32_t* b[panels];
#pragma GCC unroll 4
  for (int p = 0; p < panels; ++p) b[p] = queries + p * words * 16;
  Vec acc[rows][panels * kVecsPer16];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < panels * kVecsPer16; ++c) acc[r][c] = zero();
  }
  for (std::int64_t w = 0; w < words; ++w) multiply_step<Product, rows, panels>(acc, a, b, w);
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < panels * kVecsPer16; ++c) {
      best[r] = at_least(best[r], acc[r][c]);
      undefined = add(undefined, sub(acc[r][c], acc[r][c]));
    }
  }
}

/// One key, lane by lane: which of its products are NaN matters.
template <class Product>
[[gnu::noinline]] float careful_largest(const std::uint32_t* key, const std::uint32_t* queries, std::int64_t panels,
                                        std::int64_t words) {
  float largest = -std::numeric_limits<float>::infinity();
  for (std::int64_t p = 0; p < panels; ++p) {
    Vec acc[1][kVecsPer16];
    for (int c = 0; c < kVecsPer16; ++c) acc[0][c] = zero();
    const std::uint32_t* const a[1] = {key};
    const std::uint32_t* const b[1] = {queries + p * words * 16};
    for (std::int64_t w = 0; w < words; ++w) multiply_step<Product, 1, 1>(acc, a, b, w);
    float lanes[16];
    for (int c = 0; c < kVecsPer16; ++c) store(lanes + c * kLanes, acc[0][c]);
    for (const float x : lanes) {
      if (std::isnan(x)) return x;
      largest = largest > x ? largest : x;
    }
  }
  return largest;
}

template <class Product, int rows, int panels>
[[gnu::noinline]] void largest_products(const std::uint32_t* const* keys, std::int64_t count,
                                        const std::uint32_t* queries, std::int64_t all_panels, std::int64_t words,
                                        float* out) {
  for (std::int64_t first = 0; first < count; first += rows) {
    const std::uint32_t* a[rows];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) a[r] = keys[std::min(first + r, count - 1)];
    // Rows lie anywhere: ask for those of the next round while these are multiplied.
    for (int r = 0; r < rows && first + rows < count; ++r) {
      const std::uint32_t* next = keys[std::min(first + rows + r, count - 1)];
      for (std::int64_t w = 0; w < words; w += 16) __builtin_prefetch(next + w);
    }
    Vec best[rows];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) best[r] = set1(-std::numeric_limits<float>::infinity());
    Vec undefined = zero();
    for (std::int64_t p = 0; p < all_panels; p += panels) {
      fold_products<Product, rows, panels>(a, queries + p * words * 16, words, best, undefined);
    }
    const bool careful = reduce_add(undefined) != 0;
    const auto valid = static_cast<int>(std::min<std::int64_t>(rows, count - first));
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      if (r >= valid) break;
      out[first + r] = careful ? careful_largest<Product>(a[r], queries, all_panels, words) : reduce_max(best[r]);
    }
  }
}

template <class Product>
void largest_of_keys(const std::uint32_t* const* keys, std::int64_t count, const std::uint32_t* queries,
                     std::int64_t panels, std::int64_t words, float* out) {
  if (kGatheredPanels > 1 && panels % kGatheredPanels == 0) {
    largest_products<Product, kRegisterRows, kGatheredPanels>(keys, count, queries, panels, words, out);
  } else {
    largest_products<Product, kGatheredRows, 1>(keys, count, queries, panels, words, out);
  }
}
