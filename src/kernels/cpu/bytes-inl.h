// Rows as bytes and attention on them. Included once per level.

inline float largest_magnitude(const float* x, std::int64_t count) {
  Vec largest = zero();
  Vec difference = zero();  // x - x is 0 for finite numbers and NaN otherwise
  for (std::int64_t i = 0; i < count; i += kLanes) {
    const Vec value = load(x + i);
    largest = at_least(largest, at_least(value, sub(zero(), value)));
    difference = add(difference, sub(value, value));
  }
  return reduce_add(difference) == 0 ? reduce_max(largest) : std::numeric_limits<float>::quiet_NaN();
}

/// To the nearest, halves away from 0.
inline IntVec round_to_int(Vec x) {
  const IntVec up = to_int(at_least(zero(), add(x, set1(0.5F))));
  const IntVec down = to_int(at_least(zero(), sub(set1(0.5F), x)));
  return sub_int(up, down);
}

inline void to_bytes(const float* x, const float* scales, std::int64_t count, std::int32_t shift, std::uint8_t* bytes) {
  const IntVec shifted = set1_int(shift);
  for (std::int64_t i = 0; i < count; i += kLanes) {
    const Vec level = div(load(x + i), load(scales + i));
    store_low_bytes(bytes + i, add_int(round_to_int(level), shifted));
  }
}

inline void pack_byte_rows(const std::uint8_t* const* rows, std::int64_t words, std::uint32_t* panel) {
  const std::byte* pointers[16];
  for (int r = 0; r < 16; ++r) pointers[r] = reinterpret_cast<const std::byte*>(rows[r]);
  for (std::int64_t w = 0; w < words; w += kTransposeWords) transpose_block(pointers, w * 4, panel + w * 16);
}

/// Products without anything in their shadow.
struct NoByteShadow {
  void step() const {}
};

/// body(row, column, kLanes products as integers) for rows x panels held in registers.
template <int rows, int panels, class Body>
[[gnu::noinline]] void byte_block(const std::uint8_t* bytes, std::int64_t stride, const std::uint32_t* first_panel,
                                  std::int64_t panel_stride, std::int64_t words, const Body& body) {
  Vec acc[rows][panels * kVecsPer16];
  const std::uint32_t* a[rows];
  const std::uint32_t* b[panels];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) a[r] = reinterpret_cast<const std::uint32_t*>(bytes + r * stride);
#pragma GCC unroll 8
  for (int p = 0; p < panels; ++p) b[p] = first_panel + p * panel_stride;
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < panels * kVecsPer16; ++c) acc[r][c] = zero();
  }
  NoByteShadow shadow;
  multiply_panels<ByteProduct, rows, panels>(acc, a, b, words, shadow);
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < panels * kVecsPer16; ++c) body(r, c * kLanes, to_words(acc[r][c]));
  }
}

/// body(row, column, kLanes products) for all rows and the columns of all panels.
template <class Body>
inline void for_each_byte_product(const std::uint8_t* rows, std::int64_t row_stride, std::int64_t row_count,
                                  const std::uint32_t* panels, std::int64_t panel_stride, std::int64_t panel_count,
                                  std::int64_t words, const Body& body) {
  for (std::int64_t panel = 0; panel < panel_count; panel += kRegisterPanels) {
    const std::int64_t width = std::min<std::int64_t>(kRegisterPanels, panel_count - panel);
    with_count<kRegisterPanels>(width, [&](auto panel_constant) {
      for (std::int64_t row = 0; row < row_count; row += kRegisterRows) {
        const std::int64_t height = std::min<std::int64_t>(kRegisterRows, row_count - row);
        with_count<kRegisterRows>(height, [&](auto row_constant) {
          byte_block<row_constant(), panel_constant()>(
              rows + row * row_stride, row_stride, panels + panel * panel_stride, panel_stride, words,
              [&](int r, int c, IntVec acc) { body(row + r, panel * 16 + c, acc); });
        });
      }
    });
  }
}

inline void store_int(std::int32_t* p, IntVec x) {
  std::memcpy(p, &x, sizeof x);
}

inline void multiply_byte_rows(const std::uint8_t* rows, std::int64_t row_stride, std::int64_t row_count,
                               const std::uint32_t* panels, std::int64_t panel_stride, std::int64_t panel_count,
                               std::int64_t words, std::int32_t* products, std::int64_t product_stride) {
  for_each_byte_product(
      rows, row_stride, row_count, panels, panel_stride, panel_count, words,
      [&](std::int64_t r, std::int64_t c, IntVec acc) { store_int(products + r * product_stride + c, acc); });
}

/// Scores of a row over a tile -> bytes of its probabilities; raises the maximum, rescales what was gathered.
inline void byte_softmax(const ByteKeys& keys, const ByteScratch& scratch, std::int64_t row, std::int64_t places) {
  const float* scores = scratch.scores + row * keys.stride;
  std::uint8_t* bytes = scratch.probabilities + row * keys.stride;
  Vec highest = load(scores);
  for (std::int64_t c = kLanes; c < places; c += kLanes) highest = at_least(load(scores + c), highest);
  const float before = scratch.maximum[row];
  const float largest = reduce_max(highest);
  if (!(largest <= before)) {
    scratch.maximum[row] = largest;
    const float factor = before == -std::numeric_limits<float>::infinity() ? 0.0F : std::exp2(before - largest);
    scratch.sum[row] *= factor;
    float* output = scratch.output + row * keys.value_columns;
    const Vec scale = set1(factor);
    for (std::int64_t c = 0; c < keys.value_columns; c += kLanes) store(output + c, mul(load(output + c), scale));
  }
  const Vec shift = set1(scratch.maximum[row]);
  Vec sum = zero();
  for (std::int64_t c = 0; c < places; c += kLanes) {
    const Vec p = exp2(sub(load(scores + c), shift));
    sum = add(sum, p);
    store_low_bytes(bytes + c, to_int(fma(p, set1(kProbabilityLevels), set1(0.5F))));
  }
  scratch.sum[row] += reduce_add(sum);
}

inline void attend_bytes(const ByteKeys& keys, const ByteRows& rows, const std::int32_t* tiles, std::int64_t tile_count,
                         const ByteScratch& scratch) {
  const std::int64_t k_panel = (keys.key_words + 15) / 16 * 256;
  const std::int64_t v_panel = keys.stride / 4 * 16;
  const Vec level = set1(1 / kProbabilityLevels);
  bool spoilt = false;
  for (std::int64_t i = 0; i < tile_count; ++i) {
    const std::int64_t t = tiles[i];
    const std::int64_t count = std::min(keys.tile, keys.keys - t * keys.tile);
    const std::int64_t panels = (count + 15) / 16;
    spoilt = spoilt || keys.spoilt[t] != 0;
    const Vec scale = set1(rows.to_log2 * keys.k_scales[t]);
    const std::int32_t* sums = keys.k_sums + t * keys.stride;
    for_each_byte_product(rows.q, rows.q_stride, rows.rows, keys.k + t * (keys.stride / 16) * k_panel, k_panel, panels,
                          keys.key_words, [&](std::int64_t r, std::int64_t c, IntVec acc) {
                            // What the shift of the queries added: 128 times the sum of the key's bytes.
                            const Vec exact = to_float(sub_int(acc, load_int(sums + c)));
                            store(scratch.scores + r * keys.stride + c, mul(exact, scale));
                          });
    for (std::int64_t r = 0; r < rows.rows; ++r) {
      float* scores = scratch.scores + r * keys.stride;
      for (std::int64_t c = count; c < panels * 16; ++c) scores[c] = -std::numeric_limits<float>::infinity();
      byte_softmax(keys, scratch, r, panels * 16);
    }
    for_each_byte_product(scratch.probabilities, keys.stride, rows.rows,
                          keys.v + t * (keys.value_columns / 16) * v_panel, v_panel, keys.value_columns / 16,
                          panels * 4, [&](std::int64_t r, std::int64_t c, IntVec acc) {
                            float* output = scratch.output + r * keys.value_columns + c;
                            store(output, fma(to_float(acc), level, load(output)));
                          });
  }
  for (std::int64_t r = 0; spoilt && r < rows.rows; ++r) scratch.sum[r] = std::numeric_limits<float>::quiet_NaN();
}
