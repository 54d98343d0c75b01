// AVX-512 intrinsics in portable C++, so that the kernel text of the AVX-512 levels is tested on machines without them:
// SIMDe, and the few that its packaged version lacks.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx2.h>
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>

#include <bit>
#include <cmath>
#include <cstdint>

#include "tessera/core.h"

// NOLINTBEGIN(bugprone-reserved-identifier): these are the names the kernel text calls
using __mmask16 = simde__mmask16;

struct EmulatedM512bh {
  std::uint16_t lanes[32];
};

template <class To, class From>
inline To emulated_cast(From from) {
  return std::bit_cast<To>(from);
}

struct Floats16 {
  float lanes[16];
};
struct Words16 {
  std::uint32_t lanes[16];
};
struct Halves16 {
  std::uint16_t lanes[16];
};
struct Floats8 {
  float lanes[8];
};

inline simde__m256i emulated_narrow(simde__m512i x) {
  const auto words = emulated_cast<Words16>(x);
  Halves16 halves{};
  for (int i = 0; i < 16; ++i) halves.lanes[i] = static_cast<std::uint16_t>(words.lanes[i]);
  return emulated_cast<simde__m256i>(halves);
}
inline simde__m512i emulated_widen(simde__m256i x) {
  const auto halves = emulated_cast<Halves16>(x);
  Words16 words{};
  for (int i = 0; i < 16; ++i) words.lanes[i] = halves.lanes[i];
  return emulated_cast<simde__m512i>(words);
}
inline simde__m512 emulated_to_float(simde__m512i x) {
  const auto words = emulated_cast<Words16>(x);
  Floats16 floats{};
  for (int i = 0; i < 16; ++i) floats.lanes[i] = static_cast<float>(static_cast<std::int32_t>(words.lanes[i]));
  return emulated_cast<simde__m512>(floats);
}
inline simde__m512 emulated_from_half(simde__m256i x) {
  const auto halves = emulated_cast<Halves16>(x);
  Floats16 floats{};
  for (int i = 0; i < 16; ++i) floats.lanes[i] = tessera::f16_to_float(halves.lanes[i]);
  return emulated_cast<simde__m512>(floats);
}
inline simde__m256i emulated_to_half(simde__m512 x) {
  const auto floats = emulated_cast<Floats16>(x);
  Halves16 halves{};
  for (int i = 0; i < 16; ++i) halves.lanes[i] = tessera::float_to_f16(floats.lanes[i]);
  return emulated_cast<simde__m256i>(halves);
}
inline EmulatedM512bh emulated_to_bf16(simde__m512 upper, simde__m512 lower) {
  const auto high = emulated_cast<Floats16>(upper);
  const auto low = emulated_cast<Floats16>(lower);
  EmulatedM512bh halves{};
  for (int i = 0; i < 16; ++i) {
    halves.lanes[i] = tessera::float_to_bf16(low.lanes[i]);
    halves.lanes[16 + i] = tessera::float_to_bf16(high.lanes[i]);
  }
  return halves;
}
/// x minus the nearest multiple of 2^-(rounding / 16); 0 for infinities.
inline simde__m512 emulated_fraction(simde__m512 x, int rounding) {
  auto floats = emulated_cast<Floats16>(x);
  const auto unit = static_cast<float>(1 << (rounding >> 4));
  for (float& y : floats.lanes) y = std::isinf(y) ? 0.0F : y - std::nearbyint(y * unit) / unit;
  return emulated_cast<simde__m512>(floats);
}
/// x * 2^floor(exponent).
inline simde__m512 emulated_scale(simde__m512 x, simde__m512 exponent) {
  auto floats = emulated_cast<Floats16>(x);
  const auto exponents = emulated_cast<Floats16>(exponent);
  for (int i = 0; i < 16; ++i) floats.lanes[i] *= std::exp2(std::floor(exponents.lanes[i]));
  return emulated_cast<simde__m512>(floats);
}
inline simde__m512 emulated_expand(simde__mmask16 mask, simde__m512 x) {
  const auto packed = emulated_cast<Floats16>(x);
  Floats16 floats{};
  for (int i = 0, next = 0; i < 16; ++i) {
    if ((mask >> i & 1) != 0) floats.lanes[i] = packed.lanes[next++];
  }
  return emulated_cast<simde__m512>(floats);
}
inline float emulated_reduce(simde__m512 x, bool maximum) {
  const auto floats = emulated_cast<Floats16>(x);
  float result = floats.lanes[0];
  for (int i = 1; i < 16; ++i) {
    const float y = floats.lanes[i];
    result = maximum ? (result > y ? result : y) : result + y;
  }
  return result;
}
inline simde__m256 emulated_upper_half(simde__m512 x) {
  const auto floats = emulated_cast<Floats16>(x);
  Floats8 upper{};
  for (int i = 0; i < 8; ++i) upper.lanes[i] = floats.lanes[8 + i];
  return emulated_cast<simde__m256>(upper);
}

struct Bytes16 {
  std::int8_t lanes[16];
};
inline simde__m128i emulated_low_bytes(simde__m512i x) {
  const auto words = emulated_cast<Words16>(x);
  Bytes16 bytes{};
  for (int i = 0; i < 16; ++i) bytes.lanes[i] = static_cast<std::int8_t>(words.lanes[i]);
  return emulated_cast<simde__m128i>(bytes);
}

/// Bytes as words, with or without their sign.
inline simde__m512i emulated_widen_bytes(simde__m128i x, bool has_sign) {
  const auto bytes = emulated_cast<Bytes16>(x);
  Words16 words{};
  for (int i = 0; i < 16; ++i) {
    const std::int32_t value = has_sign ? bytes.lanes[i] : static_cast<std::uint8_t>(bytes.lanes[i]);
    words.lanes[i] = static_cast<std::uint32_t>(value);
  }
  return emulated_cast<simde__m512i>(words);
}

inline simde__m512i emulated_truncate(simde__m512 x) {
  const auto floats = emulated_cast<Floats16>(x);
  Words16 words{};
  for (int i = 0; i < 16; ++i) {
    words.lanes[i] = static_cast<std::uint32_t>(static_cast<std::int32_t>(floats.lanes[i]));
  }
  return emulated_cast<simde__m512i>(words);
}

// Macros of Clang's own headers.
#undef _mm512_cvtps_ph
#undef _mm512_extractf32x8_ps
#undef _mm512_reduce_ps
#undef _mm512_scalef_ps
#define _mm512_cvtepi32_epi8(x) emulated_low_bytes(x)
#define _mm512_cvtepi8_epi32(x) emulated_widen_bytes(x, true)
#define _mm512_cvtepu8_epi32(x) emulated_widen_bytes(x, false)
#define _mm512_cvttps_epi32(x) emulated_truncate(x)
#define _mm512_cvtepi32_epi16(x) emulated_narrow(x)
#define _mm512_cvtepu16_epi32(x) emulated_widen(x)
#define _mm512_cvtepi32_ps(x) emulated_to_float(x)
#define _mm512_cvtph_ps(x) emulated_from_half(x)
#define _mm512_cvtps_ph(x, rounding) emulated_to_half(x)
#define _mm512_cvtne2ps_pbh(upper, lower) emulated_to_bf16(upper, lower)
#define _mm512_reduce_ps(x, rounding) emulated_fraction(x, rounding)
#define _mm512_scalef_ps(x, exponent) emulated_scale(x, exponent)
#undef _mm512_madd_epi16  // SIMDe gives this name to another intrinsic
#define _mm512_madd_epi16(a, b) simde_mm512_madd_epi16(a, b)
#undef _mm512_maskz_expand_ps
#define _mm512_maskz_expand_ps(mask, x) emulated_expand(mask, x)
#define _mm512_reduce_add_ps(x) emulated_reduce(x, false)
#define _mm512_reduce_max_ps(x) emulated_reduce(x, true)
#define _mm512_extractf32x8_ps(x, half) emulated_upper_half(x)
// NOLINTEND(bugprone-reserved-identifier)
