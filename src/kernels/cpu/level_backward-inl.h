// The backward kernel text of one instruction set, with what it shares with the forward text. Internal linkage, as
// there.

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
#include "kernels/cpu/backward_stage-inl.h"
//
#include "kernels/cpu/backward_scores-inl.h"
//
#include "kernels/cpu/backward_block-inl.h"
//
#include "kernels/cpu/backward_jobs-inl.h"

constexpr BackwardKernels backward_table() {
  BackwardKernels table{};
  table.backward_tile = backward_tile;
  table.backward_key_major = backward_key_major;
  table.backward_row_numbers = backward_row_numbers;
  table.sum_lanes = sum_lanes;
  return table;
}
