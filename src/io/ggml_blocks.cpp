// Products and differences are rounded one by one: this file is built without contraction to fused operations.
#include "io/ggml_blocks.h"

#include <fmt/format.h>

#include <array>
#include <cassert>
#include <cstring>

#include "core/convert.h"

namespace tessera {

namespace {

using Bytes = const std::uint8_t*;

float half(Bytes p) {
  return f16_to_float(static_cast<std::uint16_t>(p[0] | p[1] << 8));
}

/// Bit i of a little-endian word of 32 bits.
int bit(Bytes p, int i) {
  return p[i / 8] >> (i % 8) & 1;
}

/// Blocks of 32: scale, perhaps a minimum, perhaps fifth bits, then nibbles; the low ones are the first 16 numbers.
template <bool minimum, bool fifth>
void nibbles(Bytes p, float* out) {
  const float scale = half(p);
  const float least = minimum ? half(p + 2) : 0;
  Bytes high = p + (minimum ? 4 : 2);
  Bytes low = high + (fifth ? 4 : 0);
  constexpr int zero = minimum ? 0 : (fifth ? 16 : 8);
  for (int i = 0; i < 32; ++i) {
    int q = i < 16 ? low[i] & 15 : low[i - 16] >> 4;
    if (fifth) q |= bit(high, i) << 4;
    const float product = scale * static_cast<float>(q - zero);
    out[i] = minimum ? product + least : product;
  }
}

void q8_0(Bytes p, float* out) {
  const float scale = half(p);
  for (int i = 0; i < 32; ++i) out[i] = static_cast<float>(static_cast<std::int8_t>(p[2 + i])) * scale;
}

/// 256 numbers in groups of 16 with scales and minima of 4 bits; two bits each.
void q2_k(Bytes p, float* out) {
  const float scale = half(p + 80);
  const float least = half(p + 82);
  Bytes q = p + 16;
  for (int group = 0; group < 16; ++group) {
    const float step = scale * static_cast<float>(p[group] & 15);
    const float minimum = least * static_cast<float>(p[group] >> 4);
    // 128 numbers lie in 32 bytes, 32 at each pair of bits.
    Bytes from = q + group / 8 * 32 + group % 2 * 16;
    const int shift = group % 8 / 2 * 2;
    for (int i = 0; i < 16; ++i) out[group * 16 + i] = step * static_cast<float>(from[i] >> shift & 3) - minimum;
  }
}

/// 256 numbers in groups of 16 with scales of 6 bits; two bits each and a third one apart.
void q3_k(Bytes p, float* out) {
  Bytes third = p;
  Bytes q = p + 32;
  Bytes scales = p + 96;
  const float scale = half(p + 108);
  for (int group = 0; group < 16; ++group) {
    const int low = group < 8 ? scales[group] & 15 : scales[group - 8] >> 4;
    const int high = scales[8 + group % 4] >> (group / 4 * 2) & 3;
    const float step = scale * static_cast<float>((low | high << 4) - 32);
    const int byte = group % 2 * 16;
    Bytes from = q + group / 8 * 32 + byte;
    const int shift = group % 8 / 2 * 2;
    for (int i = 0; i < 16; ++i) {
      const int value = (from[i] >> shift & 3) - ((third[byte + i] >> (group / 2) & 1) != 0 ? 0 : 4);
      out[group * 16 + i] = step * static_cast<float>(value);
    }
  }
}

/// Scale and minimum of 6 bits of one of eight groups, from 12 bytes.
struct GroupScale {
  int scale;
  int minimum;
};
GroupScale group_scale(Bytes p, int group) {
  if (group < 4) return {p[group] & 63, p[group + 4] & 63};
  return {(p[group + 4] & 15) | p[group - 4] >> 6 << 4, p[group + 4] >> 4 | p[group] >> 6 << 4};
}

/// 256 numbers in groups of 32 with scales and minima of 6 bits; four bits each, for Q5_K a fifth one apart.
template <bool fifth>
void q45_k(Bytes p, float* out) {
  const float scale = half(p);
  const float least = half(p + 2);
  Bytes high = p + 16;
  Bytes q = high + (fifth ? 32 : 0);
  for (int group = 0; group < 8; ++group) {
    const GroupScale factors = group_scale(p + 4, group);
    const float step = scale * static_cast<float>(factors.scale);
    const float minimum = least * static_cast<float>(factors.minimum);
    Bytes from = q + group / 2 * 32;
    for (int i = 0; i < 32; ++i) {
      int value = group % 2 == 0 ? from[i] & 15 : from[i] >> 4;
      if (fifth) value |= (high[i] >> group & 1) << 4;
      out[group * 32 + i] = step * static_cast<float>(value) - minimum;
    }
  }
}

/// 256 numbers in groups of 16 with scales of 8 bits; four bits each and two more apart.
void q6_k(Bytes p, float* out) {
  const float scale = half(p + 208);
  for (int group = 0; group < 16; ++group) {
    const float step = scale * static_cast<float>(static_cast<std::int8_t>(p[192 + group]));
    const int eighth = group % 8 / 2;  // which 32 of 128 numbers
    Bytes low = p + group / 8 * 64 + eighth % 2 * 32 + group % 2 * 16;
    Bytes high = p + 128 + group / 8 * 32 + group % 2 * 16;
    for (int i = 0; i < 16; ++i) {
      const int nibble = eighth < 2 ? low[i] & 15 : low[i] >> 4;
      const int value = (nibble | (high[i] >> (2 * eighth) & 3) << 4) - 32;
      out[group * 16 + i] = step * static_cast<float>(value);
    }
  }
}

struct Format {
  GgmlType type;
  std::string_view name;
  GgmlBlock block;
  void (*widen)(Bytes block, float* out);
};

constexpr std::array<Format, 13> kFormats{{
    {GgmlType::f32, "F32", {1, 4}, [](Bytes p, float* out) { std::memcpy(out, p, 4); }},
    {GgmlType::f16, "F16", {1, 2}, [](Bytes p, float* out) { *out = half(p); }},
    {GgmlType::bf16,
     "BF16",
     {1, 2},
     [](Bytes p, float* out) { *out = bf16_to_float(static_cast<std::uint16_t>(p[0] | p[1] << 8)); }},
    {GgmlType::q8_0, "Q8_0", {32, 34}, q8_0},
    {GgmlType::q4_0, "Q4_0", {32, 18}, nibbles<false, false>},
    {GgmlType::q4_1, "Q4_1", {32, 20}, nibbles<true, false>},
    {GgmlType::q5_0, "Q5_0", {32, 22}, nibbles<false, true>},
    {GgmlType::q5_1, "Q5_1", {32, 24}, nibbles<true, true>},
    {GgmlType::q2_k, "Q2_K", {256, 84}, q2_k},
    {GgmlType::q3_k, "Q3_K", {256, 110}, q3_k},
    {GgmlType::q4_k, "Q4_K", {256, 144}, q45_k<false>},
    {GgmlType::q5_k, "Q5_K", {256, 176}, q45_k<true>},
    {GgmlType::q6_k, "Q6_K", {256, 210}, q6_k},
}};

const Format* find(std::uint32_t type) {
  for (const Format& format : kFormats) {
    if (static_cast<std::uint32_t>(format.type) == type) return &format;
  }
  return nullptr;
}

}  // namespace

bool is_ggml_type(std::uint32_t type) {
  return find(type) != nullptr;
}

std::string ggml_type_name(std::uint32_t type) {
  const Format* format = find(type);
  return format != nullptr ? std::string(format->name) : fmt::format("{}", type);
}

std::string_view ggml_type_names() {
  return "F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K";
}

GgmlBlock block_of(GgmlType type) {
  const Format* format = find(static_cast<std::uint32_t>(type));
  assert(format != nullptr);
  return format->block;
}

void dequantise(GgmlType type, const std::byte* blocks, std::int64_t numbers, float* out) {
  const Format* format = find(static_cast<std::uint32_t>(type));
  assert(format != nullptr && numbers % format->block.numbers == 0);
  if (type == GgmlType::f32) {
    std::memcpy(out, blocks, static_cast<std::size_t>(numbers) * sizeof(float));
    return;
  }
  const auto* p = reinterpret_cast<Bytes>(blocks);
  for (std::int64_t i = 0; i < numbers; i += format->block.numbers, p += format->block.bytes) {
    format->widen(p, out + i);
  }
}

}  // namespace tessera
