// The kernel text of products.h, on the vector vocabulary of the attention kernels. Included once per instruction set.

#include "kernels/cpu/vector-inl.h"
//
#include "kernels/cpu/exp-inl.h"
//
#include "kernels/cpu/product-inl.h"

/// kLanes weights as floats.
template <DType dtype>
inline Vec load_weights(const std::byte* p) {
  if constexpr (dtype == DType::f32) {
    return load(reinterpret_cast<const float*>(p));
  } else if constexpr (dtype == DType::bf16) {
    return load_bf16(reinterpret_cast<const std::uint16_t*>(p));
  } else {
    return load_f16(reinterpret_cast<const std::uint16_t*>(p));
  }
}

template <DType dtype>
inline float load_weight(const std::byte* p) {
  if constexpr (dtype == DType::f32) {
    return *reinterpret_cast<const float*>(p);
  } else if constexpr (dtype == DType::bf16) {
    return bf16_to_float(*reinterpret_cast<const std::uint16_t*>(p));
  } else {
    return f16_to_float(*reinterpret_cast<const std::uint16_t*>(p));
  }
}

/// The sum of one output for one row of activations, over channels [0, whole): four sums hide the latency of an
/// addition. The only stream of reads, on which the machine reads ahead by itself.
template <DType dtype>
inline Vec dot_one(const std::byte* weights, std::int64_t whole, const float* x) {
  constexpr std::int64_t bytes = dtype == DType::f32 ? 4 : 2;
  Vec sums[4]{zero(), zero(), zero(), zero()};
  std::int64_t i = 0;
  for (; i + 4 * kLanes <= whole; i += 4 * kLanes) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const std::int64_t at = i + v * kLanes;
      sums[v] = fma(load_weights<dtype>(weights + at * bytes), load(x + at), sums[v]);
    }
  }
  for (; i < whole; i += kLanes) sums[0] = fma(load_weights<dtype>(weights + i * bytes), load(x + i), sums[0]);
  return add(add(sums[0], sums[1]), add(sums[2], sums[3]));
}

/// Four outputs of `rows` rows at a time: enough sums to hide the latency of an addition. Rows of weights are too short
/// for the machine to foresee four of them at once, so that the lines of the next four are asked for while these are
/// multiplied, into L2.
template <DType dtype, int rows>
[[gnu::noinline]] void dot_rows(const std::byte* weights, std::int64_t inputs, std::int64_t outputs, const float* x,
                                float* y, std::int64_t y_stride) {
  constexpr std::int64_t bytes = dtype == DType::f32 ? 4 : 2;
  const std::int64_t whole = inputs / kLanes * kLanes;
  for (std::int64_t first = 0; first < outputs; first += 4) {
    const std::byte* w[4];
    // Outputs beyond the last repeat it.
#pragma GCC unroll 4
    for (int o = 0; o < 4; ++o) w[o] = weights + (first + o < outputs ? first + o : outputs - 1) * inputs * bytes;
    Vec sums[rows][4];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int o = 0; o < 4; ++o) sums[r][o] = rows == 1 ? dot_one<dtype>(w[o], whole, x) : zero();
    }
    const std::int64_t ahead = 4 * inputs * bytes;
    const std::int64_t left = rows == 1 ? 0 : whole;  // one row is summed already
    for (std::int64_t i = 0; i < left; i += kLanes) {
      if (i * bytes % 64 == 0) {
#pragma GCC unroll 4
        for (const std::byte* row : w) __builtin_prefetch(row + ahead + i * bytes, 0, 2);
      }
      Vec own[4];
#pragma GCC unroll 4
      for (int o = 0; o < 4; ++o) own[o] = load_weights<dtype>(w[o] + i * bytes);
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
        const Vec activations = load(x + r * inputs + i);
#pragma GCC unroll 4
        for (int o = 0; o < 4; ++o) sums[r][o] = fma(own[o], activations, sums[r][o]);
      }
    }
    for (int r = 0; r < rows; ++r) {
      float results[4];
      reduce_add4(sums[r], results);
      for (int o = 0; o < 4 && first + o < outputs; ++o) {
        for (std::int64_t i = whole; i < inputs; ++i)
          results[o] += load_weight<dtype>(w[o] + i * bytes) * x[r * inputs + i];
        y[r * y_stride + first + o] = results[o];
      }
    }
  }
}

template <DType dtype>
void dots_of(const std::byte* weights, std::int64_t inputs, std::int64_t outputs, const float* x, std::int64_t rows,
             float* y, std::int64_t y_stride) {
  with_count<static_cast<int>(model::kDotRows)>(
      rows, [&](auto count) { dot_rows<dtype, count()>(weights, inputs, outputs, x, y, y_stride); });
}

void dots(const std::byte* weights, DType dtype, std::int64_t inputs, std::int64_t outputs, const float* x,
          std::int64_t rows, float* y, std::int64_t y_stride) {
  if (dtype == DType::f32) return dots_of<DType::f32>(weights, inputs, outputs, x, rows, y, y_stride);
  if (dtype == DType::bf16) return dots_of<DType::bf16>(weights, inputs, outputs, x, rows, y, y_stride);
  return dots_of<DType::f16>(weights, inputs, outputs, x, rows, y, y_stride);
}

/// Numbers [first, first + count) of a row of weights as words [words]: floats, or the bf16 as they lie. Zeros behind.
inline void words_of(const model::PanelCall& call, std::int64_t output, std::int64_t first, std::int64_t count,
                     std::int64_t words, std::uint32_t* out) {
  const std::int64_t bytes = call.dtype == DType::f32 ? 4 : 2;
  const std::byte* from = call.weights + (output * call.inputs + first) * bytes;
  if (call.pairs || call.dtype == DType::f32) {
    std::memcpy(out, from, static_cast<std::size_t>(count * bytes));
    std::memset(reinterpret_cast<std::byte*>(out) + count * bytes, 0,
                static_cast<std::size_t>(words * 4 - count * bytes));
    return;
  }
  auto* floats = reinterpret_cast<float*>(out);
  std::int64_t i = 0;
  if (call.dtype == DType::bf16) {
    for (; i + kLanes <= count; i += kLanes) store(floats + i, load_weights<DType::bf16>(from + i * 2));
    for (; i < count; ++i) floats[i] = load_weight<DType::bf16>(from + i * 2);
  } else {
    for (; i + kLanes <= count; i += kLanes) store(floats + i, load_weights<DType::f16>(from + i * 2));
    for (; i < count; ++i) floats[i] = load_weight<DType::f16>(from + i * 2);
  }
  for (; i < words; ++i) floats[i] = 0;
}

/// Packs words [first, first + words) of all outputs of a panel: [16 outputs][word][16]. `words` is a multiple of
/// kTransposeWords. Outputs beyond the last repeat it.
inline void pack_weights(const model::PanelCall& call, std::int64_t first, std::int64_t words) {
  const std::int64_t per_word = call.pairs ? 2 : 1;
  const std::int64_t count = std::min(words * per_word, call.inputs - first * per_word);
  // Rows of whole words can be read as they lie.
  const bool in_place = (call.pairs || call.dtype == DType::f32) && count == words * per_word;
  const std::int64_t bytes = call.dtype == DType::f32 ? 4 : 2;
  for (std::int64_t group = 0; group * 16 < call.outputs; ++group) {
    const std::byte* rows[16];
    for (std::int64_t lane = 0; lane < 16; ++lane) {
      const std::int64_t output = std::min(group * 16 + lane, call.outputs - 1);
      if (in_place) {
        rows[lane] = call.weights + (output * call.inputs + first * per_word) * bytes;
      } else {
        words_of(call, output, first * per_word, count, words, call.widened + lane * words);
        rows[lane] = reinterpret_cast<const std::byte*>(call.widened + lane * words);
      }
    }
    std::uint32_t* to = call.packed + group * words * 16;
    for (std::int64_t word = 0; word < words; word += kTransposeWords) transpose_block(rows, word * 4, to + word * 16);
  }
}

/// Outputs of `panels` groups of 16 for `rows` rows; added to y where `more`. Columns from `columns` on are not
/// written.
template <class Product, int rows, int panels>
[[gnu::noinline]] void multiply_block(const std::uint32_t* x, std::int64_t x_stride, const std::uint32_t* packed,
                                      std::int64_t words, std::int64_t used, float* y, std::int64_t y_stride,
                                      std::int64_t columns, bool more) {
  Vec acc[rows][panels * kVecsPer16];
  const std::uint32_t* a[rows];
  const std::uint32_t* b[panels];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) a[r] = x + r * x_stride;
#pragma GCC unroll 4
  for (int p = 0; p < panels; ++p) b[p] = packed + p * words * 16;
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < panels * kVecsPer16; ++c) acc[r][c] = zero();
  }
#pragma GCC unroll 4
  for (std::int64_t w = 0; w < used; ++w) multiply_step<Product, rows, panels>(acc, a, b, w);
  const bool whole = columns >= panels * 16;
  for (int r = 0; r < rows; ++r) {
    float* to = y + r * y_stride;
    float edge[panels * 16];
    if (!whole) {
      std::memset(edge, 0, sizeof edge);
      if (more) std::memcpy(edge, to, static_cast<std::size_t>(columns) * sizeof(float));
    }
    float* target = whole ? to : edge;
#pragma GCC unroll 8
    for (int c = 0; c < panels * kVecsPer16; ++c) {
      const Vec sum = more ? add(load(target + c * kLanes), acc[r][c]) : acc[r][c];
      store(target + c * kLanes, sum);
    }
    if (!whole) std::memcpy(to, edge, static_cast<std::size_t>(columns) * sizeof(float));
  }
}

template <class Product>
void panel_of(const model::PanelCall& call) {
  const std::int64_t groups = (call.outputs + 15) / 16;
  for (std::int64_t first = 0; first < call.words; first += model::kPanelWords) {
    const std::int64_t used = std::min(model::kPanelWords, call.words - first);
    const std::int64_t words = (used + kTransposeWords - 1) / kTransposeWords * kTransposeWords;
    pack_weights(call, first, words);
    for (std::int64_t row = 0; row < call.rows; row += kRegisterRows) {
      with_count<kRegisterRows>(std::min<std::int64_t>(kRegisterRows, call.rows - row), [&](auto rows) {
        for (std::int64_t group = 0; group < groups; group += kRegisterPanels) {
          with_count<kRegisterPanels>(std::min<std::int64_t>(kRegisterPanels, groups - group), [&](auto panels) {
            multiply_block<Product, rows(), panels()>(
                call.x + row * call.words + first, call.words, call.packed + group * words * 16, words, used,
                call.y + row * call.y_stride + group * 16, call.y_stride, call.outputs - group * 16, first > 0);
          });
        }
      });
    }
  }
}

void panel(const model::PanelCall& call) {
#if defined(TESSERA_LEVEL_BF16)
  if (call.pairs) return panel_of<PairProduct>(call);
#endif
  panel_of<FloatProduct>(call);
}

#if defined(TESSERA_LEVEL_BF16)
void round_pairs(const float* x, std::int64_t count, std::uint16_t* to, std::int64_t words) {
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store_bf16(to + i, load(x + i));
  for (; i < count; ++i) to[i] = float_to_bf16(x[i]);
  for (; i < 2 * words; ++i) to[i] = 0;
}
#endif

inline Vec silu(Vec x) {
  return div(x, add(set1(1.0F), exp2(mul(x, set1(-1.4426950409F)))));
}

inline Vec gelu_tanh(Vec x) {
  const Vec cube = mul(mul(x, x), x);
  const Vec inner = mul(set1(0.7978845608F), fma(set1(0.044715F), cube, x));
  return mul(mul(set1(0.5F), x), add(set1(1.0F), tanh(inner)));
}

void gated(Activation activation, float* gate, const float* up, std::int64_t count) {
  const auto apply = [&](const auto& function) {
    std::int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(gate + i, mul(function(load(gate + i)), load(up + i)));
    if (i == count) return;
    // The rest goes the same way, so that a number does not depend on its place.
    float g[kLanes] = {};
    float u[kLanes] = {};
    std::copy(gate + i, gate + count, g);
    std::copy(up + i, up + count, u);
    store(g, mul(function(load(g)), load(u)));
    std::copy(g, g + (count - i), gate + i);
  };
  if (activation == Activation::silu) {
    apply([](Vec x) { return silu(x); });
  } else {
    apply([](Vec x) { return gelu_tanh(x); });
  }
}
