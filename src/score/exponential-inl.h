// The text of exponential.h. Included in a namespace: by the header, and once per instruction set by level_*_rows.cpp,
// so that compilers vectorise it for each. No fused multiply-adds and a fixed order of sums: all give the same bits.

/// exp(x) for x <= 88 with relative error below 3e-7; 0 below -87; NaN stays NaN.
inline float exponential(float x) {
  constexpr float round_to_integer = 12582912.0F;  // 1.5 * 2^23: adding it leaves the integer in the low bits
  const float shifted = x * 1.44269504F + round_to_integer;
  const float n = shifted - round_to_integer;
  const float r = (x - n * 0.693145752F) - n * 1.42860677e-6F;
  float p = 1.9875691500e-4F;
  p = p * r + 1.3981999507e-3F;
  p = p * r + 8.3334519073e-3F;
  p = p * r + 4.1665795894e-2F;
  p = p * r + 1.6666665459e-1F;
  p = p * r + 5.0000001201e-1F;
  p = p * (r * r) + r + 1.0F;
  const float power = std::bit_cast<float>((std::bit_cast<std::uint32_t>(shifted) + 127U) << 23);
  return x < -87.0F ? 0.0F : p * power;
}

/// Largest of count scores, ignoring NaN; -inf when there is none.
inline float row_maximum(const float* row, std::int64_t count) {
  constexpr int lanes = 16;
  float best[lanes];
  for (float& x : best) x = -std::numeric_limits<float>::infinity();
  std::int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    for (int l = 0; l < lanes; ++l) best[l] = row[i + l] > best[l] ? row[i + l] : best[l];
  }
  for (; i < count; ++i) best[0] = row[i] > best[0] ? row[i] : best[0];
  float maximum = best[0];
  for (int l = 1; l < lanes; ++l) maximum = best[l] > maximum ? best[l] : maximum;
  return maximum;
}

/// row[i] = exp(row[i] - shift). A NaN score gives NaN, and so does every score when the shift is infinite.
inline void exponentiate(float* row, std::int64_t count, float shift) {
  for (std::int64_t i = 0; i < count; ++i) row[i] = exponential(row[i] - shift);
}

/// Sum in a fixed order, the same for every build.
inline float row_sum(const float* row, std::int64_t count) {
  constexpr int lanes = 8;
  float sum[lanes]{};
  std::int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    for (int l = 0; l < lanes; ++l) sum[l] += row[i + l];
  }
  for (; i < count; ++i) sum[i % lanes] += row[i];
  return ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
}
