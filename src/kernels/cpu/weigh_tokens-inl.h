// The softmax of 64 compressed tokens. Included once per level.

constexpr int kVecsPerTokens = 64 / kLanes;

/// Scores [64] in powers of 2 become probabilities relative to the maximum of the row, which may rise: then the sum and
/// the output [columns] so far are scaled.
inline void weigh_tokens(float* scores, float& maximum, float& sum, float* output, std::int64_t columns) {
  Vec highest = load(scores);
  for (int x = 1; x < kVecsPerTokens; ++x) highest = at_least(highest, load(scores + x * kLanes));
  const float raised = reduce_max(highest);
  if (raised > maximum) {
    const float factor = maximum == kMinusInfinity ? 0.0F : std::exp2(maximum - raised);
    maximum = raised;
    sum *= factor;
    for (std::int64_t c = 0; c < columns; c += kLanes) store(output + c, mul(load(output + c), set1(factor)));
  }
  Vec total = zero();
  for (int x = 0; x < kVecsPerTokens; ++x) {
    const Vec p = exp2(sub(load(scores + x * kLanes), set1(maximum)));
    total = add(total, p);
    store(scores + x * kLanes, p);
  }
  sum += reduce_add(total);
}
