// The forward kernel text of one instruction set; level_backward-inl.h has the backward text, in a compile unit of its
// own. Everything has internal linkage, so that the linker can never pick a function built for one machine where
// another is running.

#include "kernels/cpu/vector-inl.h"
//
#include "kernels/cpu/exp-inl.h"
//
#include "kernels/cpu/pack-inl.h"
//
#include "kernels/cpu/product-inl.h"
//
#include "kernels/cpu/softmax-inl.h"
//
#include "kernels/cpu/block-inl.h"
//
#include "kernels/cpu/group-inl.h"
//
#include "kernels/cpu/query_major-inl.h"
//
#include "kernels/cpu/key_major-inl.h"
//
#include "kernels/cpu/split_key-inl.h"
//
#include "kernels/cpu/weigh_tokens-inl.h"
//
#include "kernels/cpu/bitmap-inl.h"
//
#include "kernels/cpu/quantized-inl.h"
//
#include "kernels/cpu/low_bit-inl.h"
//
#include "kernels/cpu/peak-inl.h"

constexpr LevelKernels level_table(const BackwardKernels& (*backward)()) {
  LevelKernels table{};
#if defined(TESSERA_LEVEL_BF16)
  table.pairs_bf16 = true;
#endif
  table.pack = pack;
  table.attend_tile = attend_tile;
  table.attend_key_major = attend_key_major;
  table.attend_piece = attend_piece;
  table.merge_pieces = merge_pieces;
  table.find_nonfinite = find_nonfinite;
  table.attend_bitmap = attend_bitmap;
  table.attend_quantized = attend_quantized;
  table.low_bit_excess = low_bit_excess;
  table.product_loop = product_loop;
  table.read_loop = read_loop;
  table.backward = backward;
  return table;
}
