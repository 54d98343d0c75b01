// Online softmax over the columns of a block, in two parts: `raise_maximum` looks at the scores of a row and settles
// what its probabilities are relative to; SoftmaxStream turns scores into probabilities a few columns at a time, so
// that a product can carry it along. Included once per level.

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

/// 2^x as exact as the probabilities of a product are kept.
inline Vec probability_of(Vec x, FloatProduct /*unused*/) {
  return exp2(x);
}

inline void store_probabilities(float* row, std::int64_t column, Vec first, Vec second, FloatProduct /*unused*/) {
  store(row + column, first);
  store(row + column + kLanes, second);
}

#if defined(TESSERA_LEVEL_BF16)
inline Vec probability_of(Vec x, PairProduct /*unused*/) {
  return exp2_for_bf16(x);
}

inline void store_probabilities(float* row, std::int64_t column, Vec first, Vec second, PairProduct /*unused*/) {
  auto* half = reinterpret_cast<std::uint16_t*>(row) + column;
  _mm512_storeu_si512(half, std::bit_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first)));
}
#endif

/// Settles scratch.shift of a row for the next `count` columns: the negated maximum, as an exponent of 2. The maximum
/// may lag behind the true one by ScoreRule::maximum_lag, so that raising it and rescaling what was gathered is rare.
inline void raise_maximum(const ScoreRule& rule, const TileShape& shape, TileScratch& scratch, std::int64_t row,
                          std::int64_t count) {
  const float* scores = scratch.scores + row * kBlockKeys;
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
      : rule_(rule), scratch_(scratch), begin_(begin), end_(end), count_(count), row_(begin) {}

  [[gnu::always_inline]] inline void step() {
    if (row_ != end_) next_piece();
  }

  /// Does what is left and adds the rows' sums to the scratch.
  void finish() {
    while (row_ != end_) next_piece();
    for (std::int64_t first = begin_; first < end_; first += 4) {
      Vec sums[4];
      // Rows past the end hold something or other, which is not used.
      for (int r = 0; r < 4; ++r) sums[r] = load(scratch_.lane_sums + std::min(first + r, end_ - 1) * kGroupKeys);
      float total[4];
      reduce_add4(sums, total);
      for (std::int64_t row = first; row < std::min(first + 4, end_); ++row) scratch_.sum[row] += total[row - first];
    }
  }

 private:
  [[gnu::always_inline]] inline void next_piece() {
    float* scores = scratch_.scores + row_ * kBlockKeys;
    float* sums = scratch_.lane_sums + row_ * kGroupKeys;
    const Vec shift = set1(scratch_.shift[row_]);
    const Vec factor = set1(rule_.to_log2);
    const Vec first = probability_of(fma(load(scores + column_), factor, shift), Product{});
    // Past the last group: the row of scores is long enough, what it holds there is nobody's.
    const bool two = column_ + kLanes < count_;
    const Vec second = two ? probability_of(fma(load(scores + column_ + kLanes), factor, shift), Product{}) : zero();
    const Vec both = add(first, second);
    store(sums, column_ == 0 ? both : add(load(sums), both));
    store_probabilities(scores, column_, first, second, Product{});
    column_ += 2 * kLanes;
    if (column_ >= count_) {
      column_ = 0;
      ++row_;
    }
  }

  const ScoreRule& rule_;
  TileScratch& scratch_;
  std::int64_t begin_;
  std::int64_t end_;
  std::int64_t count_;
  std::int64_t row_;
  std::int64_t column_ = 0;
};

/// Softmax of rows [begin, end) over `count` columns, on its own.
template <class Product>
inline void softmax_rows(const ScoreRule& rule, const TileShape& shape, TileScratch& scratch, std::int64_t begin,
                         std::int64_t end, std::int64_t count) {
  for (std::int64_t row = begin; row < end; ++row) raise_maximum(rule, shape, scratch, row, count);
  SoftmaxStream<Product>(rule, scratch, begin, end, count).finish();
}
