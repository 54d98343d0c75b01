// Estimated scores from 4-bit numbers, reduced to what a selection asks: how far do the scores of 16 keys rise above
// the cuts of the query rows? Products of bytes: machines multiply nothing narrower. Included once per level.

/// Adds the products of one word of 4 channels. The sums are integers in float vectors: sums of integer type, or ones
/// that more than a plain store reads, GCC 12 writes to memory in every step, which halves the speed.
template <int rows, int panels>
[[gnu::always_inline]] inline void low_bit_step(Vec (&acc)[rows][panels * kVecsPer16],
                                                const std::int8_t* const (&numbers)[rows], const std::int32_t* panel,
                                                std::int64_t panel_words, std::int64_t word) {
  IntVec columns[panels * kVecsPer16];
#pragma GCC unroll 8
  for (int c = 0; c < panels * kVecsPer16; ++c) {
    columns[c] = load_int(panel + c / kVecsPer16 * panel_words + word * kGroupKeys + c % kVecsPer16 * kLanes);
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
    std::int32_t four;
    std::memcpy(&four, numbers[r] + word * 4, sizeof four);
    const IntVec factor = set1_int(four);
#pragma GCC unroll 8
    for (int c = 0; c < panels * kVecsPer16; ++c) {
      acc[r][c] = std::bit_cast<Vec>(multiply_add_bytes<false>(columns[c], factor, std::bit_cast<IntVec>(acc[r][c])));
    }
  }
}

/// Raises best[panels * 16] by the estimates of rows [first, first + rows) against neighbouring groups from `group` on.
template <int rows, int panels>
[[gnu::noinline]] void low_bit_rows(const LowBitQueries& queries, std::int64_t first, const LowBitKeys& keys,
                                    std::int64_t group, float* best) {
  constexpr int vecs = panels * kVecsPer16;
  const std::int64_t panel_words = queries.words * kGroupKeys;
  const auto* panel = reinterpret_cast<const std::int32_t*>(keys.panels) + group * panel_words;
  const std::int8_t* numbers[rows];
  Vec acc[rows][vecs];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
    numbers[r] = queries.numbers + (first + r) * queries.words * 4;
    const IntVec start = set1_int(-kLowBitOffset * queries.sum[first + r]);
#pragma GCC unroll 8
    for (int c = 0; c < vecs; ++c) acc[r][c] = std::bit_cast<Vec>(start);
  }
  for (std::int64_t word = 0; word < queries.words; ++word) {
    low_bit_step<rows, panels>(acc, numbers, panel, panel_words, word);
  }
  alignas(64) float products[rows][vecs * kLanes];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < vecs; ++c) store(products[r] + c * kLanes, acc[r][c]);
  }
  for (int c = 0; c < vecs; ++c) {
    const std::int64_t key = group * kGroupKeys + c * kLanes;
    const Vec scale = load(keys.scale + key);
    const Vec offset = load(keys.offset + key);
    Vec highest = load(best + c * kLanes);
    for (int r = 0; r < rows; ++r) {
      const Vec above = sub(offset, set1(queries.cut[first + r]));
      const Vec product =
          mul(to_float(load_int(reinterpret_cast<const std::int32_t*>(products[r]) + c * kLanes)), scale);
      highest = at_least(highest, fma(product, set1(queries.scale[first + r]), above));
    }
    store(best + c * kLanes, highest);
  }
}

void low_bit_excess(const LowBitQueries& queries, const LowBitKeys& keys, std::int64_t first_group, std::int64_t groups,
                    float* excess) {
  for (std::int64_t g = 0; g < groups; g += kRegisterPanels) {
    const std::int64_t panels = std::min<std::int64_t>(kRegisterPanels, groups - g);
    alignas(64) float best[kRegisterPanels * kGroupKeys];
    std::fill_n(best, panels * kGroupKeys, kMinusInfinity);
    for (std::int64_t first = 0, count = 0; first < queries.rows; first += count) {
      count = register_rows(queries.rows - first);
      with_count<kRegisterRows>(count, [&](auto row_count) {
        with_count<kRegisterPanels>(panels, [&](auto panel_count) {
          low_bit_rows<row_count(), panel_count()>(queries, first, keys, first_group + g, best);
        });
      });
    }
    for (std::int64_t p = 0; p < panels; ++p) {
      Vec highest = load(best + p * kGroupKeys);
      for (int lane = kLanes; lane < kGroupKeys; lane += kLanes) {
        highest = at_least(highest, load(best + p * kGroupKeys + lane));
      }
      excess[g + p] = reduce_max(highest);
    }
  }
}
