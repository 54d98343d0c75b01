// Products of small matrices that lie in L2. Included once per level.

/// Element (i, s) at data[i * row + s * step].
struct LeftMatrix {
  const float* data;
  std::int64_t row;
  std::int64_t step;
};
/// Element (s, 16 p + c) at data[s * step + p * panel + c]. Row-major: panel 16; transposed panels: step 16.
struct RightMatrix {
  const float* data;
  std::int64_t step;
  std::int64_t panel;
};
inline RightMatrix row_major(const float* data, std::int64_t stride) {
  return {data, stride, 16};
}

enum class Update : std::uint8_t { set, add, subtract };

/// c (row-major) is set to, or changed by, the product, whose rows are multiplied by `scale` where it is given.
struct Target {
  float* data;
  std::int64_t stride;
  Update update = Update::set;
  const float* row_scale = nullptr;  ///< multiplies the rows of what the product is added to
  const float* scale = nullptr;
  const float* before = nullptr;  ///< what the product is added to, of the same stride; null: c itself

  Target at(std::int64_t row, std::int64_t column) const {
    const auto moved = [](const float* from, std::int64_t by) { return from != nullptr ? from + by : nullptr; };
    const std::int64_t offset = row * stride + column;
    return {data + offset, stride, update, moved(row_scale, row), moved(scale, row), moved(before, offset)};
  }
};

/// Which part of a product is needed. Left matrices that are triangular hold zeros in their other half.
enum class Part : std::uint8_t {
  all,
  left_lower,     ///< the left matrix is lower triangular
  left_upper,     ///< upper triangular
  product_lower,  ///< only columns up to the row are wanted
};

// Rows x panels in registers.
#if defined(TESSERA_LEVEL_AVX512)
constexpr int kTileRows = 8;
constexpr int kTilePanels = 2;
#elif defined(TESSERA_LEVEL_AVX2) || defined(TESSERA_LEVEL_NEON)
constexpr int kTileRows = 6;
constexpr int kTilePanels = 1;
#else
constexpr int kTileRows = 2;
constexpr int kTilePanels = 1;
#endif

template <int rows, int panels, bool rows_adjacent>
[[gnu::noinline]] void multiply_tile(const LeftMatrix& a, const RightMatrix& b, std::int64_t steps,
                                     const Target& target) {
  constexpr int vectors = panels * kVecsPer16;
  Vec acc[rows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) acc[r][v] = zero();
  }
  const float* left[rows];
  const float* right[panels];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) left[r] = a.data + (rows_adjacent ? r : r * a.row);
#pragma GCC unroll 8
  for (int p = 0; p < panels; ++p) right[p] = b.data + p * b.panel;
  for (std::int64_t s = 0; s < steps; ++s) {
    Vec columns[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      columns[v] = load(right[v / kVecsPer16] + s * b.step + v % kVecsPer16 * kLanes);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const Vec factor = set1(rows_adjacent ? left[0][s * a.step + r] : left[r][s * a.step]);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) acc[r][v] = fma(factor, columns[v], acc[r][v]);
    }
  }
  const Target c = target;
  if (c.scale != nullptr) {
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) acc[r][v] = mul(set1(c.scale[r]), acc[r][v]);
    }
  }
  if (c.update != Update::set) {
    const float* before = c.before != nullptr ? c.before : c.data;
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        Vec value = load(before + r * c.stride + v * kLanes);
        if (c.row_scale != nullptr) value = mul(value, set1(c.row_scale[r]));
        acc[r][v] = c.update == Update::add ? add(value, acc[r][v]) : sub(value, acc[r][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) store(c.data + r * c.stride + v * kLanes, acc[r][v]);
  }
}

template <int limit, class Body>
inline void with_constant(std::int64_t count, const Body& body) {
  if constexpr (limit > 1) {
    if (count < limit) {
      with_constant<limit - 1>(count, body);
      return;
    }
  }
  body(std::integral_constant<int, limit>{});
}

/// c[rows][columns] from a[rows][steps] and b[steps][columns]; columns are rounded up to 16. `ahead`: what to ask for
/// meanwhile.
inline void multiply(const LeftMatrix& a, const RightMatrix& b, const Target& c, std::int64_t rows, std::int64_t steps,
                     std::int64_t columns, Part part = Part::all, Ahead* ahead = nullptr) {
  const std::int64_t panels = (columns + 15) / 16;
  for (std::int64_t panel = 0; panel < panels; panel += kTilePanels) {
    for (std::int64_t row = 0; row < rows; row += kTileRows) {
      const std::int64_t tile_rows = std::min<std::int64_t>(kTileRows, rows - row);
      std::int64_t tile_panels = std::min<std::int64_t>(kTilePanels, panels - panel);
      std::int64_t first_step = 0;
      std::int64_t last_step = steps;
      if (part == Part::left_lower) last_step = std::min(steps, row + tile_rows);
      if (part == Part::left_upper) first_step = std::min(steps, row);
      if (part == Part::product_lower) {
        tile_panels = std::min(tile_panels, (row + tile_rows + 15) / 16 - panel);
        if (tile_panels <= 0) continue;
      }
      const LeftMatrix left{a.data + row * a.row + first_step * a.step, a.row, a.step};
      const RightMatrix right{b.data + first_step * b.step + panel * b.panel, b.step, b.panel};
      const Target target = c.at(row, panel * 16);
      if (ahead != nullptr) ahead->step();
      with_constant<kTileRows>(tile_rows, [&](auto r) {
        with_constant<kTilePanels>(tile_panels, [&](auto p) {
          constexpr int height = decltype(r)::value;
          constexpr int width = decltype(p)::value;
          if (a.row == 1) {
            multiply_tile<height, width, true>(left, right, last_step - first_step, target);
          } else {
            multiply_tile<height, width, false>(left, right, last_step - first_step, target);
          }
        });
      });
    }
  }
}

/// Panels of 16 rows: out[row / 16][column][row % 16]. `count` and `width` are multiples of 16.
inline void transpose_to_panels(const float* matrix, std::int64_t stride, std::int64_t count, std::int64_t width,
                                float* out) {
  for (std::int64_t row = 0; row < count; row += 16) {
    const std::byte* rows[16];
    for (int lane = 0; lane < 16; ++lane)
      rows[lane] = reinterpret_cast<const std::byte*>(matrix + (row + lane) * stride);
    for (std::int64_t word = 0; word < width; word += kTransposeWords) {
      transpose_block(rows, word * 4, reinterpret_cast<std::uint32_t*>(out + row * width + word * 16));
    }
  }
}
