#include "core/convert.h"

#include <bit>
#include <cstring>

namespace tessera {

void to_float(const std::byte* row, DType dtype, std::int64_t count, float* out) {
  if (dtype == DType::f32) {
    std::memcpy(out, row, static_cast<std::size_t>(count) * sizeof(float));
  } else if (dtype == DType::bf16) {
    for (std::int64_t i = 0; i < count; ++i) {
      std::uint16_t bits;
      std::memcpy(&bits, row + i * 2, 2);
      const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
      std::memcpy(out + i, &wide, 4);
    }
  } else {
    for (std::int64_t i = 0; i < count; ++i) out[i] = load_as_float(row, dtype, i);
  }
}

void from_float(const float* in, std::int64_t count, DType dtype, std::byte* row) {
  if (dtype == DType::f32) {
    std::memcpy(row, in, static_cast<std::size_t>(count) * sizeof(float));
  } else if (dtype == DType::bf16) {
    // As float_to_bf16, without branches: compilers vectorise it.
    for (std::int64_t i = 0; i < count; ++i) {
      const auto bits = std::bit_cast<std::uint32_t>(in[i]);
      const std::uint32_t rounded = bits + 0x7fffU + ((bits >> 16) & 1U);
      const bool is_nan = (bits & 0x7fffffffU) > 0x7f800000U;
      const auto half = static_cast<std::uint16_t>((is_nan ? bits | 0x400000U : rounded) >> 16);
      std::memcpy(row + i * 2, &half, 2);
    }
  } else {
    for (std::int64_t i = 0; i < count; ++i) store_from_float(row, dtype, i, in[i]);
  }
}

}  // namespace tessera
