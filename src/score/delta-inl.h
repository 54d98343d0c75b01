// The kernel text of delta_keys.h, on the vector vocabulary of the attention kernels. Included behind it, once per
// instruction set.

template <int vecs>
void running_scores(const score::DeltaSpan& span, const float* queries, float* held, float* scores) {
  constexpr std::int64_t rows = vecs * kLanes;
  Vec acc[vecs];
#pragma GCC unroll 8
  for (int v = 0; v < vecs; ++v) acc[v] = zero();
  for (std::int64_t c = 0; c < span.dim; ++c) {
    const Vec factor = set1(held[c]);
#pragma GCC unroll 8
    for (int v = 0; v < vecs; ++v) acc[v] = fma(factor, load(queries + c * rows + v * kLanes), acc[v]);
  }
  const float* next = span.values;
  for (std::int64_t n = 0; n < span.keys; ++n) {
    for (std::int64_t w = 0; w < span.words; ++w) {
      for (std::uint64_t bits = span.bits[n * span.words + w]; bits != 0; bits &= bits - 1) {
        const std::int64_t c = w * 64 + std::countr_zero(bits);
        const float value = *next++;
        const Vec factor = set1(value - held[c]);
        held[c] = value;
#pragma GCC unroll 8
        for (int v = 0; v < vecs; ++v) acc[v] = fma(factor, load(queries + c * rows + v * kLanes), acc[v]);
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < vecs; ++v) store(scores + n * rows + v * kLanes, acc[v]);
  }
}
