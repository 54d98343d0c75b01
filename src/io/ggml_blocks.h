// Number formats of ggml: numbers in blocks with scales of their own. Names and layouts are those of the GGUF
// specification.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace tessera {

/// Values are those of the file format.
enum class GgmlType : std::uint32_t {
  f32 = 0,
  f16 = 1,
  q4_0 = 2,
  q4_1 = 3,
  q5_0 = 6,
  q5_1 = 7,
  q8_0 = 8,
  q2_k = 10,
  q3_k = 11,
  q4_k = 12,
  q5_k = 13,
  q6_k = 14,
  bf16 = 30,
};

/// Numbers and bytes of a block.
struct GgmlBlock {
  std::int64_t numbers;
  std::int64_t bytes;
};

/// Whether the number of a file names a type that can be read.
bool is_ggml_type(std::uint32_t type);
/// "Q4_K"; of types that cannot be read their number.
std::string ggml_type_name(std::uint32_t type);
inline std::string name_of(GgmlType type) {
  return ggml_type_name(static_cast<std::uint32_t>(type));
}
/// All readable types, for messages.
std::string_view ggml_type_names();
GgmlBlock block_of(GgmlType type);

/// Bytes of consecutive numbers; the count must be a multiple of the block's.
inline std::int64_t bytes_of(GgmlType type, std::int64_t numbers) {
  const GgmlBlock block = block_of(type);
  return numbers / block.numbers * block.bytes;
}

/// `numbers` numbers as float32, bit for bit as ggml's reference code and the package `gguf` widen them. `blocks` may
/// start anywhere.
void dequantise(GgmlType type, const std::byte* blocks, std::int64_t numbers, float* out);

}  // namespace tessera
