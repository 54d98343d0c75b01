// Packing keys and values into panels of 16 keys. Included once per level.
//
// Key panel: [word][16 keys], a word being a float or a pair of 16-bit numbers. Value panel: [16 columns][key][16] in
// floats, or [16 columns][key pair][16][2] in bf16 pairs. Rows come by pointer, so gathered, strided and paged keys
// are packed by the same text.

/// panel[w][lane] = word w of rows[lane], zero past the end of the row.
inline void pack_key_panel(const std::byte* const* rows, std::int64_t row_bytes, std::uint32_t* panel) {
  constexpr std::int64_t block_bytes = kTransposeWords * 4;
  std::int64_t offset = 0;
  for (; offset + block_bytes <= row_bytes; offset += block_bytes) {
    transpose_block(rows, offset, panel + offset / 4 * kGroupKeys);
  }
  if (offset == row_bytes) return;
  alignas(64) std::byte tail[kGroupKeys][block_bytes] = {};
  const std::byte* tail_rows[kGroupKeys];
  for (int lane = 0; lane < kGroupKeys; ++lane) {
    std::memcpy(tail[lane], rows[lane] + offset, static_cast<std::size_t>(row_bytes - offset));
    tail_rows[lane] = tail[lane];
  }
  transpose_block(tail_rows, 0, panel + offset / 4 * kGroupKeys);
}

/// Storage panel of 16-bit numbers -> panel of floats.
inline void widen_key_panel(const std::uint32_t* storage, std::int64_t storage_words, DType dtype, std::uint32_t* out) {
  auto* floats = reinterpret_cast<float*>(out);
  if (dtype == DType::bf16) {
    for (std::int64_t w = 0; w < storage_words; ++w) {
      for (int lane = 0; lane < kGroupKeys; lane += kLanes) {
        Vec even;
        Vec odd;
        split_bf16_words(storage + w * kGroupKeys + lane, even, odd);
        store(floats + 2 * w * kGroupKeys + lane, even);
        store(floats + (2 * w + 1) * kGroupKeys + lane, odd);
      }
    }
  } else {
    for (std::int64_t w = 0; w < storage_words; ++w) {
      for (int lane = 0; lane < kGroupKeys; lane += kLanes) {
        float* even = floats + 2 * w * kGroupKeys + lane;
        widen_f16_words(storage + w * kGroupKeys + lane, even, even + kGroupKeys);
      }
    }
  }
}

template <DType dtype>
inline Vec load_storage(const std::byte* row, std::int64_t i) {
  if constexpr (dtype == DType::f32) return load(reinterpret_cast<const float*>(row) + i);
  if constexpr (dtype == DType::bf16) return load_bf16(reinterpret_cast<const std::uint16_t*>(row) + i);
  return load_f16(reinterpret_cast<const std::uint16_t*>(row) + i);
}

/// Two vectors of consecutive numbers, as fast as the dtype allows: bf16 come out as those at even and those at odd
/// places, which costs two operations instead of four; the others in their order. paired_place() says where each went.
template <DType dtype>
inline void load_storage_pair(const std::byte* row, std::int64_t i, Vec& first, Vec& second) {
  if constexpr (dtype == DType::bf16) {
    split_bf16_words(reinterpret_cast<const std::uint32_t*>(reinterpret_cast<const std::uint16_t*>(row) + i), first,
                     second);
  } else {
    first = load_storage<dtype>(row, i);
    second = load_storage<dtype>(row, i + kLanes);
  }
}

/// Place of number i of a pair of vectors as load_storage_pair returns them.
inline std::int64_t paired_place(DType dtype, std::int64_t i) {
  return dtype == DType::bf16 ? i % 2 * kLanes + i / 2 : i;
}

/// Calls body with the dtype as a compile-time constant.
template <class Body>
inline void with_dtype(DType dtype, const Body& body) {
  if (dtype == DType::f32) {
    body(std::integral_constant<DType, DType::f32>{});
  } else if (dtype == DType::bf16) {
    body(std::integral_constant<DType, DType::bf16>{});
  } else {
    body(std::integral_constant<DType, DType::f16>{});
  }
}

/// Value panel of floats: columns past value_dim are zero.
inline void stage_values(const std::byte* const* rows, const TileShape& shape, std::uint32_t* panel) {
  auto* out = reinterpret_cast<float*>(panel);
  const std::int64_t whole = shape.value_dim / 16 * 16;
  with_dtype(shape.dtype, [&](auto dtype) {
    for (int lane = 0; lane < kGroupKeys; ++lane) {
      for (std::int64_t c = 0; c < whole; c += kLanes) {
        store(out + c / 16 * 256 + lane * 16 + c % 16, load_storage<decltype(dtype)::value>(rows[lane], c));
      }
    }
  });
  if (whole == shape.value_dim) return;
  for (int lane = 0; lane < kGroupKeys; ++lane) {
    float* tail = out + whole * 16 + lane * 16;
    for (std::int64_t c = whole; c < shape.value_columns; ++c) {
      tail[c - whole] = c < shape.value_dim ? load_as_float(rows[lane], shape.dtype, c) : 0.0F;
    }
  }
}

#if defined(TESSERA_LEVEL_BF16)
/// Value panel of bf16 pairs: keys 2i and 2i + 1 side by side.
inline void stage_value_pairs(const std::byte* const* rows, const TileShape& shape, std::uint32_t* panel) {
  const std::int64_t whole = shape.value_dim / 16 * 16;
  for (int pair = 0; pair < kGroupKeys / 2; ++pair) {
    const auto* first = reinterpret_cast<const std::uint16_t*>(rows[2 * pair]);
    const auto* second = reinterpret_cast<const std::uint16_t*>(rows[2 * pair + 1]);
    for (std::int64_t c = 0; c < whole; c += 16) {
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first + c)));
      const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(second + c)));
      _mm512_storeu_si512(panel + c * 8 + pair * 16, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
    for (std::int64_t c = whole; c < shape.value_columns; ++c) {
      const std::uint32_t low = c < shape.value_dim ? first[c] : 0;
      const std::uint32_t high = c < shape.value_dim ? second[c] : 0;
      panel[whole * 8 + pair * 16 + c - whole] = low | high << 16;
    }
  }
}
#endif

inline void stage_value_panel(const std::byte* const* rows, const TileShape& shape, std::uint32_t* panel) {
#if defined(TESSERA_LEVEL_BF16)
  if (shape.pair_product) {
    stage_value_pairs(rows, shape, panel);
    return;
  }
#endif
  stage_values(rows, shape, panel);
}

inline void pack(const TileShape& shape, const PackedSource& source, std::int64_t first_group, std::int64_t last_group,
                 std::uint32_t* k_panels, std::uint32_t* v_panels) {
  alignas(64) static constexpr std::byte zeros[4096] = {};
  const auto row_bytes = shape.head_dim * static_cast<std::int64_t>(size_of(shape.dtype));
  for (std::int64_t group = first_group; group < last_group; ++group) {
    const std::byte* k_rows[kGroupKeys];
    const std::byte* v_rows[kGroupKeys];
    for (std::int64_t lane = 0; lane < kGroupKeys; ++lane) {
      const std::int64_t key = group * kGroupKeys + lane;
      k_rows[lane] = key < source.keys ? source.k.row(key) : zeros;
      v_rows[lane] = key < source.keys ? source.v.row(key) : zeros;
    }
    if (k_panels != nullptr) pack_key_panel(k_rows, row_bytes, k_panels + group * shape.k_storage_panel);
    if (v_panels != nullptr) stage_value_panel(v_rows, shape, v_panels + group * shape.v_panel);
  }
}

inline bool find_nonfinite(const TileShape& shape, const PackedSource& source, std::int64_t first, std::int64_t last,
                           std::uint8_t* flags) {
  bool found = false;
  with_dtype(shape.dtype, [&](auto dtype) {
    for (std::int64_t key = first; key < last; ++key) {
      const std::byte* row = source.v.row(key);
      // x - x is 0 for finite numbers and NaN otherwise; NaN survives every sum.
      Vec difference = zero();
      std::int64_t c = 0;
      for (; c + kLanes <= shape.value_dim; c += kLanes) {
        const Vec x = load_storage<decltype(dtype)::value>(row, c);
        difference = add(difference, sub(x, x));
      }
      float total = reduce_add(difference);
      for (; c < shape.value_dim; ++c) {
        const float x = load_as_float(row, shape.dtype, c);
        total += x - x;
      }
      flags[key] = total == 0 ? 0 : 1;
      found = found || flags[key] != 0;
    }
  });
  return found;
}
