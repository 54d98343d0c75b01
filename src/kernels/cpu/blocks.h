// What the common code and the text of products with weights in ggml blocks share. Plain data only.
#pragma once

#include <cstddef>
#include <cstdint>

#include "io/ggml_blocks.h"

namespace tessera::kernels {

/// Numbers that are unpacked together; activations are padded to a multiple of it.
constexpr std::int64_t kBlockChunk = 1024;
/// Activations of one scale.
constexpr std::int64_t kActivationGroup = 32;
/// Rows of activations that a row of weights is multiplied with while it is unpacked.
constexpr std::int64_t kBlockRows = 8;

/// Rows of activations as signed bytes: number = byte * scale of its group. Behind the last number all is 0. A group
/// that holds NaN or Inf has the scale NaN. Arrays that no product reads are null: of the first three, one row is read
/// as its types need it, several rows always as `bytes`.
struct ByteActivations {
  std::int64_t rows;
  std::int64_t padded;       ///< numbers of a row, a multiple of kBlockChunk
  const std::int8_t* bytes;  ///< [rows][padded]
  /// [rows][padded] the same as K types pair nibbles: of every eight groups the first halves of groups 0, 2, 4 and 6,
  /// their second halves, and so those of groups 1, 3, 5 and 7.
  const std::int8_t* paired;
  /// [rows][padded] the same: of every four groups the first halves, then the second ones.
  const std::int8_t* quartered;
  const float* scales;          ///< [rows][padded / 32]
  const float* sums;            ///< [rows][padded / 16] of the numbers that the bytes stand for; for scales of 16
  const float* sums_of_groups;  ///< [rows][padded / 32] the same
  const float* group_weights;   ///< [rows][padded / 16] beside `paired`: scales of eight groups, then their sums
};

/// Weights [outputs][inputs] in blocks along the rows.
struct BlockRows {
  GgmlType type;
  const std::byte* blocks;
  std::int64_t row_bytes;
  std::int64_t outputs;
  std::int64_t inputs;
};

}  // namespace tessera::kernels
