// The AVX-512 intrinsics of byte products that the packaged SIMDe lacks; continues emulate_avx512.h.
#pragma once

#include "support/emulate_avx512.h"

struct Bytes16 {
  std::uint8_t lanes[16];
};
inline simde__m128i emulated_low_bytes(simde__m512i x) {
  const auto words = emulated_cast<Words16>(x);
  Bytes16 bytes{};
  for (int i = 0; i < 16; ++i) bytes.lanes[i] = static_cast<std::uint8_t>(words.lanes[i]);
  return emulated_cast<simde__m128i>(bytes);
}
inline simde__m512i emulated_truncate(simde__m512 x) {
  const auto floats = emulated_cast<Floats16>(x);
  Words16 words{};
  for (int i = 0; i < 16; ++i) {
    words.lanes[i] = static_cast<std::uint32_t>(static_cast<std::int32_t>(floats.lanes[i]));
  }
  return emulated_cast<simde__m512i>(words);
}

// NOLINTBEGIN(bugprone-reserved-identifier): these are the names the kernel text calls
#undef _mm512_madd_epi16  // SIMDe's name has two arguments too many
#define _mm512_madd_epi16(a, b) simde_mm512_madd_epi16(a, b)
#define _mm512_cvtepi32_epi8(x) emulated_low_bytes(x)
#define _mm512_cvttps_epi32(x) emulated_truncate(x)
// NOLINTEND(bugprone-reserved-identifier)
