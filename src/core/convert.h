// Bulk conversion between the attention dtypes and float.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tessera/core.h"

namespace tessera {

/// out[0..count) = row[0..count) as float. dtype is f32, bf16 or f16.
void to_float(const std::byte* row, DType dtype, std::int64_t count, float* out);
/// row[0..count) = in[0..count), rounded to nearest even.
void from_float(const float* in, std::int64_t count, DType dtype, std::byte* row);

}  // namespace tessera
