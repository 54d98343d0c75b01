// Number types and their conversions.
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <string>
#include <utility>

#include "core/error.h"
#include "tessera/core.h"

namespace tessera {

namespace {

struct TypeRow {
  DType dtype;
  std::string_view name;
  std::size_t size;
};
constexpr std::array<TypeRow, 7> kTypeRows{{{DType::f32, "f32", 4},
                                            {DType::bf16, "bf16", 2},
                                            {DType::f16, "f16", 2},
                                            {DType::f64, "f64", 8},
                                            {DType::u8, "u8", 1},
                                            {DType::i32, "i32", 4},
                                            {DType::i64, "i64", 8}}};

const TypeRow& row_of(DType dtype) {
  return kTypeRows.at(static_cast<std::size_t>(dtype));
}

}  // namespace

std::size_t size_of(DType dtype) {
  return row_of(dtype).size;
}
std::string_view name_of(DType dtype) {
  return row_of(dtype).name;
}
bool is_attention_dtype(DType dtype) {
  return dtype == DType::f32 || dtype == DType::bf16 || dtype == DType::f16;
}

DType dtype_from_name(std::string_view name) {
  for (const TypeRow& row : kTypeRows) {
    if (row.name == name) return row.dtype;
  }
  fail("dtype '{}' is unknown; known: f32, bf16, f16, f64, u8, i32, i64", name);
}

float bf16_to_float(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

std::uint16_t float_to_bf16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if (std::isnan(value)) return static_cast<std::uint16_t>((bits >> 16) | 0x40U);
  return static_cast<std::uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}

float f16_to_float(std::uint16_t bits) {
  const std::uint32_t sign = (bits & 0x8000U) << 16;
  const std::uint32_t exponent = (bits >> 10) & 0x1fU;
  const std::uint32_t mantissa = bits & 0x3ffU;
  if (exponent == 0x1f) return std::bit_cast<float>(sign | 0x7f800000U | (mantissa << 13));
  if (exponent == 0) return std::copysign(std::ldexp(static_cast<float>(mantissa), -24), sign ? -1.0F : 1.0F);
  return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

std::uint16_t float_to_f16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000U);
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return static_cast<std::uint16_t>(sign | 0x7e00U | ((bits >> 13) & 0x3ffU));
  if (magnitude >= 65520.0F) return static_cast<std::uint16_t>(sign | 0x7c00U);
  if (magnitude < 6.103515625e-05F) {  // subnormal: the unit is 2^-24; nearbyint rounds to even
    return static_cast<std::uint16_t>(sign | static_cast<std::uint16_t>(std::nearbyint(std::ldexp(magnitude, 24))));
  }
  const std::uint32_t rebiased = (bits & 0x7fffffffU) - (112U << 23);
  return static_cast<std::uint16_t>(sign | ((rebiased + 0xfffU + ((rebiased >> 13) & 1U)) >> 13));
}

float load_as_float(const std::byte* row, DType dtype, std::int64_t i) {
  if (dtype == DType::f32) {
    float value;
    std::memcpy(&value, row + i * 4, 4);
    return value;
  }
  std::uint16_t bits;
  std::memcpy(&bits, row + i * 2, 2);
  return dtype == DType::bf16 ? bf16_to_float(bits) : f16_to_float(bits);
}

void store_from_float(std::byte* row, DType dtype, std::int64_t i, float value) {
  if (dtype == DType::f32) {
    std::memcpy(row + i * 4, &value, 4);
    return;
  }
  const std::uint16_t bits = dtype == DType::bf16 ? float_to_bf16(value) : float_to_f16(value);
  std::memcpy(row + i * 2, &bits, 2);
}

namespace {

std::array<std::int64_t, 4> strides_of(const std::array<std::int64_t, 4>& shape, Layout layout) {
  const auto [batch, heads, tokens, dim] = shape;
  if (layout == Layout::bhnd) return {heads * tokens * dim, tokens * dim, dim, 1};
  return {tokens * heads * dim, dim, heads * dim, 1};
}

}  // namespace

TensorView view_of(const void* data, DType dtype, std::array<std::int64_t, 4> shape, Layout layout) {
  return {data, dtype, shape, strides_of(shape, layout)};
}
MutableTensorView mutable_view_of(void* data, DType dtype, std::array<std::int64_t, 4> shape, Layout layout) {
  return {data, dtype, shape, strides_of(shape, layout)};
}

}  // namespace tessera
