// Attention over bitmap-compressed tokens: tiles of 64 numbers are expanded in registers and multiplied at once, keys
// channel by channel, values token by token. Included once per level.

constexpr int kBitmapRows = 4;
constexpr int kVecsPerTile = kVecsPerTokens;
/// Vectors of a tile whose sums stay in registers together: 4 rows of them, of 32 registers or of 16.
constexpr int kVecsAtOnce = kLanes == 16 ? 4 : 2;

/// sums[r][64] += coefficients[r * stride + i] * tile i, for `count` tiles.
template <DType dtype, int rows>
inline void bitmap_product(const BitmapTiles& tiles, std::int64_t first, std::int64_t count, const float* coefficients,
                           std::int64_t stride, float* sums, std::int64_t sums_stride) {
  for (int part = 0; part < kVecsPerTile; part += kVecsAtOnce) {
    Vec acc[rows][kVecsAtOnce];
    for (int r = 0; r < rows; ++r) {
      for (int x = 0; x < kVecsAtOnce; ++x) acc[r][x] = load(sums + r * sums_stride + (part + x) * kLanes);
    }
    for (std::int64_t i = 0; i < count; ++i) {
      const std::uint64_t bitmap = tiles.bitmaps[first + i];
      std::int64_t next = static_cast<std::int64_t>(tiles.offsets[first + i]) * 8 +
                          (part == 0 ? 0 : std::popcount(bitmap & ((std::uint64_t{1} << (part * kLanes)) - 1)));
      Vec x[kVecsAtOnce];
#pragma GCC unroll 4
      for (int p = 0; p < kVecsAtOnce; ++p) {
        const auto bits = static_cast<std::uint32_t>(bitmap >> ((part + p) * kLanes)) & ((1U << kLanes) - 1);
        x[p] = expand_lanes(load_storage<dtype>(tiles.numbers, next), bits);
        next += std::popcount(bits);
      }
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
        const Vec factor = set1(coefficients[r * stride + i]);
#pragma GCC unroll 4
        for (int p = 0; p < kVecsAtOnce; ++p) acc[r][p] = fma(factor, x[p], acc[r][p]);
      }
    }
    for (int r = 0; r < rows; ++r) {
      for (int x = 0; x < kVecsAtOnce; ++x) store(sums + r * sums_stride + (part + x) * kLanes, acc[r][x]);
    }
  }
}

/// One group of 64 tokens for up to kBitmapRows rows; `output` rows are `columns` floats apart.
template <DType dtype, int rows>
inline void attend_bitmap_group(const BitmapProblem& problem, const BitmapTiles& keys, const BitmapTiles& values,
                                std::int64_t group, const float* q, std::int64_t columns, float* maximum, float* sum,
                                float* output) {
  alignas(64) float scores[rows * kBitmapTile] = {};
  bitmap_product<dtype, rows>(keys, group * problem.head_dim, problem.head_dim, q, problem.head_dim, scores,
                              kBitmapTile);
  for (int r = 0; r < rows; ++r) {
    weigh_tokens(scores + r * kBitmapTile, maximum[r], sum[r], output + r * columns, columns);
  }
  for (std::int64_t slab = 0; slab < columns / kBitmapTile; ++slab) {
    bitmap_product<dtype, rows>(values, group * columns + slab * kBitmapTile, kBitmapTile, scores, kBitmapTile,
                                output + slab * kBitmapTile, columns);
  }
}

/// Adds a batch to the states of all rows: maximum [rows] in powers of 2, sum [rows], output [rows][columns].
void attend_bitmap(const BitmapProblem& problem, const BitmapTiles& keys, const BitmapTiles& values, const float* q,
                   float* maximum, float* sum, float* output) {
  const std::int64_t columns = (problem.value_dim + kBitmapTile - 1) / kBitmapTile * kBitmapTile;
  with_dtype(problem.dtype, [&](auto dtype) {
    for (std::int64_t group = 0; group < keys.groups; ++group) {
      for (std::int64_t first = 0; first < problem.rows; first += kBitmapRows) {
        with_count<kBitmapRows>(std::min<std::int64_t>(kBitmapRows, problem.rows - first), [&](auto count) {
          attend_bitmap_group<decltype(dtype)::value, count()>(problem, keys, values, group,
                                                               q + first * problem.head_dim, columns, maximum + first,
                                                               sum + first, output + first * columns);
        });
      }
    }
  });
}
