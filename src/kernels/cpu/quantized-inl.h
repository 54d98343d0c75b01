// Attention over quantised tokens: what is constant along a sum (queries times steps, probabilities times steps)
// becomes integers of a few bytes, so that codes are multiplied as they come out of their words, four at a time.
// Included once per level.

constexpr int kQuantizedRows = 4;
/// Vectors of lanes whose sums stay in registers together.
constexpr int kQuantizedVecs = kLanes == 16 ? 2 : 1;
/// Coefficients are numbers to this base: digits fit into signed bytes.
constexpr float kDigitBase = 254.0F;
/// Adding it leaves the nearest integer in the low bits.
constexpr float kToInteger = 12582912.0F;

constexpr int digits_beside(int bits) {
  return bits == 8 ? 3 : 2;
}
/// The largest coefficient: its first digit fits into a byte, and kToInteger can round it (below 2^22).
constexpr float largest_coefficient(int digits) {
  return digits == 3 ? 4.1e6F : 127 * kDigitBase;
}

inline Vec nearest(Vec x) {
  return sub(add(x, set1(kToInteger)), set1(kToInteger));
}

/// body(0), body(1), ... with constants.
template <int count, class Body>
[[gnu::always_inline]] inline void unrolled(const Body& body) {
  [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
    (body(std::integral_constant<int, i>{}), ...);
  }
  (std::make_integer_sequence<int, count>{});
}

/// Coefficients of up to 4 rows: integers, highest digit first, times `factor`; and the part of the sum without codes.
struct Coefficients {
  std::int8_t* bytes;  ///< [row][digit][count]
  float* products;     ///< [count]: working memory
  std::int64_t count;
  float factor[kQuantizedRows];
  float offset[kQuantizedRows];
};

/// `count` scales from `first` on, through a buffer unless they are floats.
inline const float* scales_as_float(const QuantizedTiles& tiles, const std::byte* scales, std::int64_t first,
                                    std::int64_t count, float* buffer) {
  const std::byte* from = scales + first * (tiles.format.scale_dtype == DType::f32 ? 4 : 2);
  if (tiles.format.scale_dtype == DType::f32) return reinterpret_cast<const float*>(from);
  with_dtype(tiles.format.scale_dtype, [&](auto dtype) {
    for (std::int64_t i = 0; i < count; i += kLanes) store(buffer + i, load_storage<decltype(dtype)::value>(from, i));
  });
  return buffer;
}

/// Coefficients base * steps and offsets sum(base * minima), of rows `stride` floats apart; without minima the offset
/// is the sum of the coefficients, and without steps they are the base.
template <int digits, int rows>
inline void make_coefficients(const float* base, std::int64_t stride, const float* steps, const float* minima,
                              Coefficients& out) {
  constexpr float largest = largest_coefficient(digits);
  for (int r = 0; r < rows; ++r) {
    Vec highest = zero();
    Vec offset = zero();
    for (std::int64_t i = 0; i < out.count; i += kLanes) {
      const Vec b = load(base + r * stride + i);
      const Vec c = steps == nullptr ? b : mul(b, load(steps + i));
      offset = minima == nullptr ? add(offset, c) : fma(b, load(minima + i), offset);
      highest = at_least(at_least(highest, c), sub(zero(), c));
      store(out.products + i, c);
    }
    const float magnitude = reduce_max(highest);
    // Where all is nearly 0 nothing is left; what is not a number goes into the offset.
    const bool usable = magnitude > 1e-30F;
    out.factor[r] = usable ? magnitude / largest : 0.0F;
    out.offset[r] = reduce_add(offset);
    const Vec to_integers = set1(usable ? largest / magnitude : 0.0F);
    std::int8_t* bytes = out.bytes + r * digits * out.count;
    for (std::int64_t i = 0; i < out.count; i += kLanes) {
      Vec rest = nearest(mul(load(out.products + i), to_integers));
      float unit = digits == 3 ? kDigitBase * kDigitBase : kDigitBase;
      for (int digit = 0; digit < digits; ++digit, unit /= kDigitBase) {
        const Vec value = digit + 1 == digits ? rest : nearest(mul(rest, set1(1 / unit)));
        rest = sub(rest, mul(value, set1(unit)));
        store_low_bytes(bytes + digit * out.count + i, add(value, set1(kToInteger)));
      }
    }
  }
}

/// Four codes of every lane: those of step `step` of a granule, in the bytes of a word.
template <int bits, int step>
[[gnu::always_inline]] inline IntVec codes_of(const IntVec* words) {
  if constexpr (bits == 8) return words[0];
  if constexpr (bits == 4) return bits_and(shift_right<4 * step>(words[0]), set1_int(0x0f0f0f0f));
  const IntVec low_bits = bits_and(shift_right<2 * (step % 4)>(words[bits == 3 ? step / 4 : 0]), set1_int(0x03030303));
  if constexpr (bits == 2) return low_bits;
  const IntVec high_bit = bits_and(shift_right<step>(words[granule_words(bits) - 1]), set1_int(0x01010101));
  return bits_or(low_bits, shift_left<2>(high_bit));
}

/// out[r][v] = sum over the depth of coefficient * code for the lanes of vector v, without factor and offset. Asks for
/// the codes `ahead` words later, at the same place of the next block: a cell is too short for the hardware to see it
/// coming. What lies behind the last block is not touched by asking.
template <int bits, int rows, int vecs>
[[gnu::noinline]] void multiply_codes(const std::uint32_t* const* codes, std::int64_t granules, std::int64_t ahead,
                                      const Coefficients& coefficients, Vec (&out)[kQuantizedRows][kQuantizedVecs]) {
  constexpr int digits = digits_beside(bits);
  constexpr int words = static_cast<int>(granule_words(bits));
  constexpr int depth = static_cast<int>(granule_depth(bits));
  IntVec sums[rows][digits][vecs];
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 3
    for (int digit = 0; digit < digits; ++digit) {
#pragma GCC unroll 2
      for (int v = 0; v < vecs; ++v) sums[r][digit][v] = set1_int(0);
    }
  }
  for (std::int64_t granule = 0; granule < granules; ++granule) {
    IntVec packed[vecs][words];
#pragma GCC unroll 2
    for (int v = 0; v < vecs; ++v) {
#pragma GCC unroll 3
      for (int w = 0; w < words; ++w) {
        const std::uint32_t* from = codes[v] + (granule * words + w) * kQuantizedCell;
        packed[v][w] = load_int(reinterpret_cast<const std::int32_t*>(from));
        __builtin_prefetch(from + ahead, 0, 2);
      }
    }
    unrolled<depth / 4>([&](auto step) __attribute__((always_inline)) {
      IntVec four[vecs];
#pragma GCC unroll 2
      for (int v = 0; v < vecs; ++v) four[v] = codes_of<bits, decltype(step)::value>(packed[v]);
      const std::int8_t* bytes = coefficients.bytes + granule * depth + 4 * step;
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 3
        for (int digit = 0; digit < digits; ++digit) {
          std::int32_t word;
          std::memcpy(&word, bytes + (r * digits + digit) * coefficients.count, sizeof word);
          const IntVec factor = set1_int(word);
#pragma GCC unroll 2
          for (int v = 0; v < vecs; ++v) {
            sums[r][digit][v] = multiply_add_bytes<bits == 8>(four[v], factor, sums[r][digit][v]);
          }
        }
      }
    });
  }
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < vecs; ++v) {
      Vec total = to_float(sums[r][0][v]);
#pragma GCC unroll 2
      for (int digit = 1; digit < digits; ++digit) {
        total = fma(total, set1(kDigitBase), to_float(sums[r][digit][v]));
      }
      out[r][v] = total;
    }
  }
}

/// Calls body with a width of codes as a constant.
template <class Body>
inline void with_bits(int bits, const Body& body) {
  if (bits == 2) return body(std::integral_constant<int, 2>{});
  if (bits == 3) return body(std::integral_constant<int, 3>{});
  if (bits == 4) return body(std::integral_constant<int, 4>{});
  body(std::integral_constant<int, 8>{});
}

/// sums(r, lane, vector): products of `base` rows with a block, lane by lane, all scales in them. `depth_first`: where
/// the depth of the block begins among the depths of its batch; `lane_first`: the same for lanes.
template <int bits, int rows, class Body>
inline void multiply_block(const QuantizedTiles& tiles, const QuantizedBlock& block, std::int64_t depth_first,
                           std::int64_t lane_first, const float* base, std::int64_t stride, bool keep,
                           Coefficients& coefficients, const Body& sums) {
  constexpr int digits = digits_beside(bits);
  const bool along_depth = tiles.scales_along_depth();
  const bool keys = tiles.side == QuantizedSide::keys;
  const float* lane_factors = keys ? nullptr : tiles.factors;
  alignas(64) float steps[kQuantizedBlock];
  alignas(64) float minima[kQuantizedBlock];
  std::int64_t made = keep ? 0 : -1;  // the lane group whose coefficients are there
  for (std::int64_t vec = 0; vec < block.cells * kVecsPer16; vec += kQuantizedVecs) {
    const std::int64_t lane = vec * kLanes;
    const std::int64_t group = along_depth ? (lane_first + lane) / tiles.lanes_per_group() : 0;
    if (group != made) {
      made = group;
      if (along_depth) {
        // More than a block's worth of depths are channels, whose scales go through the working memory behind products.
        float* long_steps = coefficients.count > kQuantizedBlock ? coefficients.products + coefficients.count : steps;
        float* long_minima =
            coefficients.count > kQuantizedBlock ? coefficients.products + 2 * coefficients.count : minima;
        const std::int64_t first = group * tiles.scale_count + depth_first;
        make_coefficients<digits, rows>(
            base, stride, scales_as_float(tiles, tiles.steps, first, coefficients.count, long_steps),
            scales_as_float(tiles, tiles.minima, first, coefficients.count, long_minima), coefficients);
      } else {
        make_coefficients<digits, rows>(base, stride, keys ? tiles.factors : nullptr, nullptr, coefficients);
      }
    }
    const std::uint32_t* codes[kQuantizedVecs];
    const auto count = std::min<std::int64_t>(kQuantizedVecs, block.cells * kVecsPer16 - vec);
    for (int v = 0; v < count; ++v) {
      codes[v] = block.codes + (vec + v) / kVecsPer16 * block.cell_words + (vec + v) % kVecsPer16 * kLanes;
    }
    Vec products[kQuantizedRows][kQuantizedVecs];
    with_count<kQuantizedVecs>(count, [&](auto vecs) {
      multiply_codes<bits, rows, vecs()>(codes, block.granules, block.cells * block.cell_words, coefficients, products);
    });
    for (int v = 0; v < count; ++v) {
      const std::int64_t at = lane + v * kLanes;
      for (int r = 0; r < rows; ++r) {
        Vec x = mul(products[r][v], set1(coefficients.factor[r]));
        if (along_depth) {
          x = add(x, set1(coefficients.offset[r]));
        } else {
          const std::int64_t first = lane_first + at;
          const Vec step = load(scales_as_float(tiles, tiles.steps, first, kLanes, steps));
          const Vec minimum = load(scales_as_float(tiles, tiles.minima, first, kLanes, minima));
          x = fma(x, step, mul(minimum, set1(coefficients.offset[r])));
        }
        if (lane_factors != nullptr) x = mul(x, load(lane_factors + at));
        sums(r, at, x);
      }
    }
  }
}

template <int rows>
inline void attend_quantized_rows(const QuantizedProblem& problem, const QuantizedTiles& keys,
                                  const QuantizedTiles& values, std::int64_t first, std::int64_t last, const float* q,
                                  float* maximum, float* sum, float* output, std::byte* scratch) {
  const std::int64_t columns = output_columns(problem.value_dim);
  const std::int64_t depth = quantized_query_stride(problem.head_dim);
  Coefficients of_keys{};
  of_keys.count = depth;
  of_keys.products = reinterpret_cast<float*>(scratch);
  of_keys.bytes = reinterpret_cast<std::int8_t*>(of_keys.products + 3 * depth);
  alignas(64) std::int8_t value_bytes[kQuantizedRows * 3 * kQuantizedBlock];
  alignas(64) float value_products[kQuantizedBlock];
  Coefficients of_values{};
  of_values.bytes = value_bytes;
  of_values.products = value_products;
  of_values.count = kQuantizedBlock;
  alignas(64) float scores[rows * kQuantizedBlock];
  // Coefficients of the keys serve all blocks unless scales change from group to group.
  const bool one_group = keys.format.group == 0;
  for (std::int64_t b = first; b < last; ++b) {
    const QuantizedBlock key_block = keys.block(b);
    with_bits(keys.format.bits, [&](auto bits) {
      multiply_block<bits(), rows>(
          keys, key_block, 0, b * kQuantizedBlock, q, depth, one_group && b > first, of_keys,
          [&](int r, std::int64_t lane, Vec x) { store(scores + r * kQuantizedBlock + lane, x); });
    });
    for (int r = 0; r < rows; ++r) {
      float* row = scores + r * kQuantizedBlock;
      for (std::int64_t t = key_block.tokens; t < kQuantizedBlock; ++t) row[t] = kMinusInfinity;
      weigh_tokens(row, maximum[r], sum[r], output + r * columns, columns);
    }
    with_bits(values.format.bits, [&](auto bits) {
      multiply_block<bits(), rows>(values, values.block(b), b * kQuantizedBlock, 0, scores, kQuantizedBlock, false,
                                   of_values, [&](int r, std::int64_t lane, Vec x) {
                                     float* to = output + r * columns + lane;
                                     store(to, add(load(to), x));
                                   });
    });
  }
}

void attend_quantized(const QuantizedProblem& problem, const QuantizedTiles& keys, const QuantizedTiles& values,
                      std::int64_t first, std::int64_t last, const float* queries, float* maximum, float* sum,
                      float* output, std::byte* scratch) {
  const std::int64_t columns = output_columns(problem.value_dim);
  const std::int64_t stride = quantized_query_stride(problem.head_dim);
  for (std::int64_t row = 0; row < problem.rows; row += kQuantizedRows) {
    with_count<kQuantizedRows>(std::min<std::int64_t>(kQuantizedRows, problem.rows - row), [&](auto rows) {
      attend_quantized_rows<rows()>(problem, keys, values, first, last, queries + row * stride, maximum + row,
                                    sum + row, output + row * columns, scratch);
    });
  }
}
