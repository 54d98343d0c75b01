// The text of quantised kernels of one instruction set. Internal linkage, as in level-inl.h.

#include "kernels/cpu/vector-inl.h"
//
#include "kernels/cpu/vector_bytes-inl.h"
//
#include "kernels/cpu/exp-inl.h"
//
#include "kernels/cpu/product-inl.h"
//
#include "kernels/cpu/bytes-inl.h"
//
#include "kernels/cpu/blocks-inl.h"

constexpr ByteKernels byte_table() {
  ByteKernels table{};
  table.largest_magnitude = largest_magnitude;
  table.to_bytes = to_bytes;
  table.pack_rows = pack_byte_rows;
  table.multiply = multiply_byte_rows;
  table.attend = attend_bytes;
  table.quantise_activations = quantise_activations;
  table.multiply_blocks = multiply_blocks;
  table.widen_blocks = widen_blocks;
  return table;
}
