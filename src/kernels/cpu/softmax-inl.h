// Online softmax over the columns of a block, in two parts: `raise_maximum` looks at the scores of a row and settles
// what its probabilities are relative to; SoftmaxStream turns scores into probabilities a few columns at a time, so
// that a product can carry it along. Included once per level.

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

/// 2^x as exact as the probabilities of a product are kept.
inline Vec probability_of(Vec x, FloatProduct /*unused*/) {
  return exp2(x);
}

inline void store_probabilities(std::byte* to, Vec first, Vec second, FloatProduct /*unused*/) {
  store(reinterpret_cast<float*>(to), first);
  store(reinterpret_cast<float*>(to) + kLanes, second);
}

#if defined(TESSERA_LEVEL_BF16)
inline Vec probability_of(Vec x, PairProduct /*unused*/) {
  return exp2_for_bf16(x);
}

inline void store_probabilities(std::byte* to, Vec first, Vec second, PairProduct /*unused*/) {
  _mm512_storeu_si512(to, std::bit_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first)));
}
#endif

/// Readies a row of scores for SoftmaxStream: settles scratch.shift, the negated maximum of the first `count` columns
/// as an exponent of 2. The maximum may lag behind the true one by ScoreRule::maximum_lag, so that raising it and
/// rescaling what was gathered is rare.
inline void raise_maximum(const ScoreRule& rule, const TileShape& shape, TileScratch& scratch, std::int64_t row,
                          std::int64_t count) {
  float* scores = scratch.scores + row * kBlockKeys;
  // The stream takes two vectors at a time.
  if (count % (2 * kLanes) != 0) store(scores + count, set1(kMinusInfinity));
  for (int lane = 0; lane < kGroupKeys; lane += kLanes) store(scratch.lane_sums + row * kGroupKeys + lane, zero());
  Vec highest = set1(kMinusInfinity);
#pragma GCC unroll 4
  for (std::int64_t c = 0; c < count; c += kLanes) highest = at_least(load(scores + c), highest);
  const float before = scratch.maximum[row];
  if (any_greater(highest, set1(before + rule.maximum_lag))) {
    const float raised = reduce_max(highest);
    scratch.maximum[row] = raised;
    // A row without any allowed key so far has maximum -inf and shift 0, which makes its exponents -inf, not NaN.
    scratch.shift[row] = -raised * rule.to_log2;
    if (before != kMinusInfinity) {
      const float factor = std::exp2((before - raised) * rule.to_log2);
      scratch.sum[row] *= factor;
      float* output = scratch.output_rows[row];
      const Vec scale = set1(factor);
      for (std::int64_t c = 0; c < shape.value_columns; c += kLanes) store(output + c, mul(load(output + c), scale));
    }
  }
}

/// Scores of rows [begin, end) -> probabilities, in place, two vectors of columns per step.
template <class Product>
class SoftmaxStream {
 public:
  SoftmaxStream(const ScoreRule& rule, TileScratch& scratch, std::int64_t begin, std::int64_t end, std::int64_t count)
      : scratch_(scratch), begin_(begin), end_(end), factor_(rule.to_log2) {
    steps_ = (count + 2 * kLanes - 1) / (2 * kLanes);
    row_ = begin - 1;
    next_row();
  }

  /// Cheap when there is nothing left to do.
  [[gnu::always_inline]] inline void step() {
    if (row_ == end_) return;
    const Vec shift = set1(*shift_);
    const Vec factor = set1(factor_);
    const Vec first = probability_of(fma(load(from_), factor, shift), Product{});
    const Vec second = probability_of(fma(load(from_ + kLanes), factor, shift), Product{});
    store(sums_, add(load(sums_), add(first, second)));
    store_probabilities(to_, first, second, Product{});
    from_ += 2 * kLanes;
    to_ += 2 * kLanes * sizeof(float) / Product::keys_per_word;
    if (--left_ == 0) next_row();
  }

  /// Does what is left and adds the rows' sums to the scratch.
  void finish() {
    while (row_ != end_) step();
    for (std::int64_t first = begin_; first < end_; first += 4) {
      Vec sums[4];
      for (int r = 0; r < 4; ++r) sums[r] = load(scratch_.lane_sums + std::min(first + r, end_ - 1) * kGroupKeys);
      float total[4];
      reduce_add4(sums, total);
      for (std::int64_t row = first; row < std::min(first + 4, end_); ++row) scratch_.sum[row] += total[row - first];
    }
  }

 private:
  void next_row() {
    if (++row_ == end_) return;
    from_ = scratch_.scores + row_ * kBlockKeys;
    to_ = reinterpret_cast<std::byte*>(scratch_.scores + row_ * kBlockKeys);
    sums_ = scratch_.lane_sums + row_ * kGroupKeys;
    shift_ = scratch_.shift + row_;
    left_ = steps_;
  }

  TileScratch& scratch_;
  std::int64_t begin_;
  std::int64_t end_;
  float factor_;
  std::int64_t steps_;
  std::int64_t row_;

  // Where the row stands.
  const float* from_ = nullptr;
  std::byte* to_ = nullptr;
  float* sums_ = nullptr;
  const float* shift_ = nullptr;
  std::int64_t left_ = 0;
};

/// Softmax of rows [begin, end) over `count` columns, on its own.
template <class Product>
inline void softmax_rows(const ScoreRule& rule, const TileShape& shape, TileScratch& scratch, std::int64_t begin,
                         std::int64_t end, std::int64_t count) {
  for (std::int64_t row = begin; row < end; ++row) raise_maximum(rule, shape, scratch, row, count);
  SoftmaxStream<Product>(rule, scratch, begin, end, count).finish();
}
