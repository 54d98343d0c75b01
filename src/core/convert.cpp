#include "core/convert.h"

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
  } else {
    for (std::int64_t i = 0; i < count; ++i) store_from_float(row, dtype, i, in[i]);
  }
}

}  // namespace tessera
