// Estimated scores from 4-bit numbers, reduced to what a selection asks: how far do the scores of 16 keys rise above
// the cuts of the query rows? Products of bytes: machines multiply nothing narrower. Included once per level.

/// Raises best[panels * 16] by the estimates of rows [first, first + rows) against neighbouring groups from `group` on.
template <int rows, int panels>
[[gnu::noinline]] void low_bit_rows(const LowBitQueries& queries, std::int64_t first, const LowBitKeys& keys,
                                    std::int64_t group, float* best) {
  constexpr int vecs = panels * kVecsPer16;
  const std::int64_t panel_words = queries.words * kGroupKeys;
  const auto* panel = reinterpret_cast<const std::int32_t*>(keys.panels) + group * panel_words;
  const std::int8_t* numbers[rows];
  IntVec acc[rows][vecs];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
    numbers[r] = queries.numbers + (first + r) * queries.words * 4;
    const IntVec start = set1_int(-kLowBitOffset * queries.sum[first + r]);
#pragma GCC unroll 8
    for (int c = 0; c < vecs; ++c) acc[r][c] = start;
  }
  for (std::int64_t word = 0; word < queries.words; ++word) {
    IntVec columns[vecs];
#pragma GCC unroll 8
    for (int c = 0; c < vecs; ++c) {
      columns[c] = load_int(panel + c / kVecsPer16 * panel_words + word * kGroupKeys + c % kVecsPer16 * kLanes);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      std::int32_t four;
      std::memcpy(&four, numbers[r] + word * 4, sizeof four);
      const IntVec factor = set1_int(four);
#pragma GCC unroll 8
      for (int c = 0; c < vecs; ++c) acc[r][c] = multiply_add_bytes<false>(columns[c], factor, acc[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < vecs; ++c) {
    const std::int64_t key = group * kGroupKeys + c * kLanes;
    const Vec scale = load(keys.scale + key);
    const Vec offset = load(keys.offset + key);
    Vec highest = load(best + c * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const Vec above = sub(offset, set1(queries.cut[first + r]));
      highest = at_least(highest, fma(mul(to_float(acc[r][c]), scale), set1(queries.scale[first + r]), above));
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
