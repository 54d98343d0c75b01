// The classical selectors on a few sampled query tiles: how much softmax mass each recovers at one budget. Used to show
// that generated heads behave like heads (docs/data.md), and to judge methods at lengths without room for N x N.
#pragma once

#include <cstdint>

#include "tessera/core.h"

namespace tessera::eval {

struct SelectorOptions {
  std::int64_t tile = 64;         ///< query rows and keys of a tile
  double budget = 0.1;            ///< share of what a query tile may see
  std::int64_t query_tiles = 16;  ///< sampled evenly over the sequence
  std::int64_t antidiagonal_stride = 8;
  std::int64_t page = 16;        ///< tokens, of the page bound
  std::int64_t probe_rows = 64;  ///< last rows that vertical-slash looks at
  int threads = 0;
};

/// Mean recovered softmax mass of each selector at the budget, and sizes. Tile selectors always keep the first and the
/// diagonal tile within their budget (the oracle is free).
struct SelectorReport {
  double tokens_for_95 = 0;  ///< share of the visible keys that hold 95 % of a row's mass
  double tiles_for_95 = 0;   ///< share of the visible tiles that hold 95 % of a query tile's mass
  double oracle_tokens = 0;
  double oracle_tiles = 0;
  double window = 0;               ///< first tile and the nearest tiles
  double vertical_slash = 0;       ///< strongest columns and diagonals of the last rows, half of the budget each
  double pooled = 0;               ///< mean query times mean key
  double antidiagonal = 0;         ///< strided antidiagonal sums, softmax over key groups (XAttention)
  double random_tiles = 0;         ///< expectation
  double page_bound = 0;           ///< per row, min/max bound of the logits of a page (Quest)
  double antidiagonal_rel_l1 = 0;  ///< output error of the antidiagonal selection
};

/// q, k, v [B, Hq, N, D] with as many queries as keys and N at least 4 tiles, one query head of batch 0. The length is
/// cut to whole tiles. Query tiles so early that the budget is below two tiles are not sampled when there are later
/// ones.
SelectorReport evaluate_selectors(const Problem& problem, const TensorView& q, const TensorView& k, const TensorView& v,
                                  std::int64_t q_head, const SelectorOptions& options = {});

}  // namespace tessera::eval
