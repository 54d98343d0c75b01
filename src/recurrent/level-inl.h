// The whole kernel text of one instruction set, on the vector vocabulary of the attention kernels. Everything has
// internal linkage, so that the linker can never pick a function built for one machine where another is running.

#include "kernels/cpu/vector-inl.h"
//
#include "kernels/cpu/exp-inl.h"
//
#include "recurrent/matrix-inl.h"
//
#include "recurrent/rows-inl.h"
//
#include "recurrent/chunk-inl.h"
//
#include "recurrent/step-inl.h"
//
#include "recurrent/gradient-inl.h"
//
#include "recurrent/tile_states-inl.h"

constexpr LevelKernels level_table() {
  return {prepare, advance, pass,     write,
          read,    step,    backward, {key_state, sum_states, query_tile, query_tile_backward, key_tile_backward}};
}
