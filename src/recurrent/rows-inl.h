// Rows of tensors in and out, and loops over rows. Included once per level.

/// e^x for x <= 0, relative error near the rounding of float: products of 128 of them stay exact to 1e-5.
inline Vec exp_of(Vec x) {
  return exp2_by_polynomial(mul(x, set1(1.4426950409F)), 1.5252734e-5F, 1.5403530e-4F, 1.3333558e-3F, 9.6181291e-3F,
                            5.5504109e-2F, 2.4022651e-1F, 6.9314718e-1F, 1.0F);
}

inline Vec load_number(const std::byte* row, DType dtype, std::int64_t i) {
  if (dtype == DType::f32) return load(reinterpret_cast<const float*>(row) + i);
  const auto* half = reinterpret_cast<const std::uint16_t*>(row) + i;
  return dtype == DType::bf16 ? load_bf16(half) : load_f16(half);
}

/// out[0..columns) = scale * row[0..width), then zeros. `columns` is a multiple of 16.
inline void load_row(const std::byte* row, DType dtype, std::int64_t width, std::int64_t columns, float scale,
                     float* out) {
  const Vec factor = set1(scale);
  std::int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) store(out + i, mul(factor, load_number(row, dtype, i)));
  for (; i < width; ++i) out[i] = scale * load_as_float(row, dtype, i);
  for (; i < columns; ++i) out[i] = 0;
}

inline void store_row(const float* in, DType dtype, std::int64_t width, std::byte* row) {
  std::int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    if (dtype == DType::f32) {
      store(reinterpret_cast<float*>(row) + i, load(in + i));
    } else if (dtype == DType::bf16) {
      store_bf16(reinterpret_cast<std::uint16_t*>(row) + i, load(in + i));
    } else {
      store_f16(reinterpret_cast<std::uint16_t*>(row) + i, load(in + i));
    }
  }
  for (; i < width; ++i) store_from_float(row, dtype, i, in[i]);
}

inline std::byte* column_of(const OutputRows& rows, std::int64_t t, std::int64_t column) {
  return rows.row(t) + column * static_cast<std::int64_t>(size_of(rows.dtype));
}
inline const std::byte* column_of(const Rows& rows, std::int64_t t, std::int64_t column) {
  return rows.row(t) + column * static_cast<std::int64_t>(size_of(rows.dtype));
}

/// Asks for a row of `bytes` that is read, or written, some rows later.
inline void prefetch_to_read(const std::byte* row, std::int64_t bytes) {
  for (std::int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, 0);
}
inline void prefetch_to_write(const std::byte* row, std::int64_t bytes) {
  for (std::int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, 1);
}
/// Rows between such a request and the use.
constexpr std::int64_t kRowsAhead = 12;

/// Loops over vectors of a row: body(i) for i = 0, kLanes, ... below `columns`.
template <class Body>
inline void each_vector(std::int64_t columns, const Body& body) {
  for (std::int64_t i = 0; i < columns; i += kLanes) body(i);
}

inline void fill_zero(float* out, std::int64_t columns) {
  each_vector(columns, [&](std::int64_t i) { store(out + i, zero()); });
}
inline void fill_one(float* out, std::int64_t columns) {
  each_vector(columns, [&](std::int64_t i) { store(out + i, set1(1.0F)); });
}
/// out = a * b
inline void multiply_rows(const float* a, const float* b, std::int64_t columns, float* out) {
  each_vector(columns, [&](std::int64_t i) { store(out + i, mul(load(a + i), load(b + i))); });
}
inline void scale_row(const float* a, float factor, std::int64_t columns, float* out) {
  const Vec f = set1(factor);
  each_vector(columns, [&](std::int64_t i) { store(out + i, mul(f, load(a + i))); });
}
/// out += a * b
inline void add_product(const float* a, const float* b, std::int64_t columns, float* out) {
  each_vector(columns, [&](std::int64_t i) { store(out + i, fma(load(a + i), load(b + i), load(out + i))); });
}
inline float dot(const float* a, const float* b, std::int64_t columns) {
  Vec sum = zero();
  each_vector(columns, [&](std::int64_t i) { sum = fma(load(a + i), load(b + i), sum); });
  return reduce_add(sum);
}
