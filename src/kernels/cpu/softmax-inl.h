// Online softmax over the columns of a block, a few columns at a time, so that a product can carry it along. It is
// optimistic: probabilities are relative to the maximum that the row had before the block, which for most blocks is
// close enough to the new one, and only a row whose probabilities come out large is done again. Included once per
// level.

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

/// A score relative to the maximum of its row, as an exponent of 2: what scores of float products are (score_rule_of).
inline Vec exponent_of(Vec score, Vec /*to_log2*/, Vec shift, FloatProduct /*unused*/) {
  return add(score, shift);
}

/// 2^x as exact as the probabilities of a product are kept.
inline Vec probability_of(Vec x, FloatProduct /*unused*/) {
  return exp2_beside_product(x);
}

inline void store_probabilities(std::byte* to, Vec first, Vec second, FloatProduct /*unused*/) {
  store(reinterpret_cast<float*>(to), first);
  store(reinterpret_cast<float*>(to) + kLanes, second);
}

#if defined(TESSERA_LEVEL_BF16)
inline Vec exponent_of(Vec score, Vec to_log2, Vec shift, PairProduct /*unused*/) {
  return fma(score, to_log2, shift);
}

inline Vec probability_of(Vec x, PairProduct /*unused*/) {
  return exp2_for_bf16(x);
}

inline void store_probabilities(std::byte* to, Vec first, Vec second, PairProduct /*unused*/) {
  _mm512_storeu_si512(to, std::bit_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first)));
}
#endif

/// Lane sums of a block's probabilities above this mean that the row's maximum is too far behind.
constexpr float kLargestLaneSum = 4096;

/// Raises the maximum of a row to that of its scores and rescales what was gathered. scratch.shift is the negated
/// maximum as an exponent of 2.
inline void raise_maximum(const ScoreRule& rule, const TileShape& shape, TileScratch& scratch, std::int64_t row,
                          std::int64_t count) {
  const float* scores = scratch.scores + row * kBlockKeys;
  Vec highest = set1(kMinusInfinity);
  for (std::int64_t c = 0; c < count; c += kLanes) highest = at_least(load(scores + c), highest);
  const float before = scratch.maximum[row];
  if (!any_greater(highest, set1(before))) return;
  const float raised = reduce_max(highest);
  scratch.maximum[row] = raised;
  // A row without any allowed key so far has maximum -inf and shift 0, which makes its exponents -inf, not NaN.
  scratch.shift[row] = -raised * rule.to_log2;
  if (before == kMinusInfinity) return;
  const float factor = std::exp2((before - raised) * rule.to_log2);
  scratch.sum[row] *= factor;
  float* output = scratch.output_rows[row];
  const Vec scale = set1(factor);
  for (std::int64_t c = 0; c < shape.value_columns; c += kLanes) store(output + c, mul(load(output + c), scale));
}

/// Readies a row of scores for SoftmaxStream.
inline void ready_row(const ScoreRule& rule, const TileShape& shape, TileScratch& scratch, std::int64_t row,
                      std::int64_t count) {
  // The stream takes two vectors at a time.
  if (count % (2 * kLanes) != 0) store(scratch.scores + row * kBlockKeys + count, set1(kMinusInfinity));
  store(scratch.lane_sums + row * kGroupKeys, zero());
  if (scratch.maximum[row] == kMinusInfinity) raise_maximum(rule, shape, scratch, row, count);
}

/// Scores of rows [begin, end), made ready before, -> probabilities, two vectors of columns per step. `Product` will
/// read the probabilities, `Scores` has made the scores.
template <class Product, class Scores = Product>
class SoftmaxStream {
 public:
  SoftmaxStream(const ScoreRule& rule, const TileShape& shape, TileScratch& scratch, std::int64_t begin,
                std::int64_t end, std::int64_t count)
      : rule_(rule), shape_(shape), scratch_(scratch), begin_(begin), end_(end), count_(count), row_(begin) {
    start_row();
  }

  /// Does nothing when there is nothing left.
  [[gnu::always_inline]] inline void step() {
    if (row_ == end_) return;
    const Vec shift = set1(*shift_);
    const Vec factor = set1(rule_.to_log2);
    const Vec first = probability_of(exponent_of(load(from_), factor, shift, Scores{}), Product{});
    const Vec second = probability_of(exponent_of(load(from_ + kLanes), factor, shift, Scores{}), Product{});
    store(sums_, add(load(sums_), add(first, second)));
    store_probabilities(to_, first, second, Product{});
    from_ += 2 * kLanes;
    to_ += 2 * kLanes * sizeof(float) / Product::keys_per_word;
    if (--left_ == 0) {
      ++row_;
      start_row();
    }
  }

  /// Does what is left, corrects rows whose maximum was too low, and adds the rows' sums to the scratch.
  void finish() {
    while (row_ != end_) step();
    for (std::int64_t row = begin_; row < end_; ++row) {
      if (any_greater(load(scratch_.lane_sums + row * kGroupKeys), set1(kLargestLaneSum))) do_again(row);
    }
    for (std::int64_t first = begin_; first < end_; first += 4) {
      Vec sums[4];
      for (int r = 0; r < 4; ++r) sums[r] = load(scratch_.lane_sums + std::min(first + r, end_ - 1) * kGroupKeys);
      float total[4];
      reduce_add4(sums, total);
      for (std::int64_t row = first; row < std::min(first + 4, end_); ++row) scratch_.sum[row] += total[row - first];
    }
  }

 private:
  void start_row() {
    from_ = scratch_.scores + row_ * kBlockKeys;
    to_ = reinterpret_cast<std::byte*>(scratch_.probabilities + row_ * kBlockKeys / Product::keys_per_word);
    sums_ = scratch_.lane_sums + row_ * kGroupKeys;
    shift_ = scratch_.shift + row_;
    left_ = (count_ + 2 * kLanes - 1) / (2 * kLanes);
  }

  void do_again(std::int64_t row) {
    raise_maximum(rule_, shape_, scratch_, row, count_);
    store(scratch_.lane_sums + row * kGroupKeys, zero());
    row_ = row;
    start_row();
    while (row_ == row) step();
    row_ = end_;
  }

  const ScoreRule& rule_;
  const TileShape& shape_;
  TileScratch& scratch_;
  std::int64_t begin_;
  std::int64_t end_;
  std::int64_t count_;
  std::int64_t row_;

  // Where the row stands.
  const float* from_ = nullptr;
  std::byte* to_ = nullptr;
  float* sums_ = nullptr;
  const float* shift_ = nullptr;
  std::int64_t left_ = 0;
};

/// Scores of a row -> weights that need no maximum, and their sum.
template <class Product>
inline void weigh_row(const Call& call, const ScoreRule& rule, const TileJob& job, TileScratch& scratch,
                      std::int64_t row, std::int64_t count) {
  const Modifiers& modifiers = call.inputs.modifiers;
  const bool again = rule.weights == RowWeights::reweighted;
  const float factor =
      again ? modifiers.weight_factors.data()[call.lse_index(job.sequence, scratch.head[row], scratch.query[row])]
            : 1.0F;
  const auto weight = [&](Vec score) {
    const Vec own = softplus(score);
    if (!again) return own;
    const Vec base = at_least(zero(), fma(own, set1(factor), set1(-modifiers.weight_offset)));
    Vec power = base;
    for (std::int32_t i = 1; i < modifiers.weight_power; ++i) power = mul(power, base);
    return power;
  };
  float* scores = scratch.scores + row * kBlockKeys;
  if (count % (2 * kLanes) != 0) store(scores + count, set1(kMinusInfinity));
  auto* to = reinterpret_cast<std::byte*>(scratch.probabilities + row * kBlockKeys / Product::keys_per_word);
  Vec sums = zero();
  for (std::int64_t c = 0; c < count; c += 2 * kLanes) {
    const Vec first = weight(load(scores + c));
    const Vec second = weight(load(scores + c + kLanes));
    sums = add(sums, add(first, second));
    store_probabilities(to, first, second, Product{});
    to += 2 * kLanes * sizeof(float) / Product::keys_per_word;
  }
  scratch.sum[row] += reduce_add(sums);
}

/// Softmax of rows [begin, end) over `count` columns, on its own.
template <class Product, class Scores>
inline void softmax_rows(const ScoreRule& rule, const TileShape& shape, TileScratch& scratch, std::int64_t begin,
                         std::int64_t end, std::int64_t count) {
  for (std::int64_t row = begin; row < end; ++row) ready_row(rule, shape, scratch, row, count);
  SoftmaxStream<Product, Scores>(rule, shape, scratch, begin, end, count).finish();
}
