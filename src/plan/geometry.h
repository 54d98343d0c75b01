// Where the rows of a plan lie: queries and keys of a block, their positions, and pairs inside a window in closed form.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "tessera/plan.h"

namespace tessera {

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return a / b + (a % b != 0 ? 1 : 0);
}
/// 64-bit words of a bitmask row over this many keys.
constexpr std::int64_t mask_words_of(std::int64_t keys) {
  return ceil_div(keys, 64);
}

/// Whether the window of a query at position p contains position j.
inline bool window_contains(const Window& window, std::int64_t p, std::int64_t j) {
  return (window.left < 0 || j >= p - window.left) && (window.right < 0 || j <= p + window.right);
}

/// One block of a plan: what is needed to judge its rows. Places count in the block's order, positions in the sequence.
struct BlockView {
  std::int64_t block = 0;
  std::int64_t sequence = 0;
  std::int64_t queries = 0;  ///< places of queries
  std::int64_t keys = 0;     ///< places of source 0
  std::int64_t q_offset = 0;
  std::int64_t tile_q = 0;
  std::span<const std::int32_t> query_order;  ///< empty: identity
  std::span<const std::int32_t> key_order;

  BlockView(const Plan& plan, std::int64_t of_block)
      : block(of_block),
        sequence(plan.sequence_of_block(of_block)),
        queries(plan.queries_of(of_block)),
        keys(plan.problem.kv_len_of(sequence)),
        q_offset(plan.problem.q_offset_of(sequence)),
        tile_q(plan.tile_q) {
    if (!plan.query_order.empty()) query_order = plan.query_order[of_block];
    if (!plan.key_order.empty()) key_order = plan.key_order[of_block];
  }

  std::int64_t tiles() const { return ceil_div(queries, tile_q); }
  std::int64_t rows_of(std::int64_t tile) const { return std::min(tile_q, queries - tile * tile_q); }
  std::int64_t query_position(std::int64_t place) const {
    return q_offset + (query_order.empty() ? place : query_order[place]);
  }
  std::int64_t key_position(std::int64_t place) const { return key_order.empty() ? place : key_order[place]; }
  /// Positions follow places: closed forms apply.
  bool in_order() const { return query_order.empty() && key_order.empty(); }
};

/// Query heads and sequences that share each block of the plan.
inline std::int64_t sharers_of_block(const Plan& plan) {
  return plan.problem.q_heads / plan.plan_heads * (plan.problem.batch / plan.plan_sequences);
}

bool same_problem(const Problem& a, const Problem& b);

/// Throws Error unless the tile sizes are positive and plan_heads and plan_sequences divide the problem as Plan says.
void check_division(const Problem& problem, std::int64_t tile_q, std::int64_t tile_k, std::int64_t plan_heads,
                    std::int64_t plan_sequences);

/// Sum of clamp(x, 0, limit) for x in [first, first + count).
std::int64_t sum_of_clamped(std::int64_t first, std::int64_t count, std::int64_t limit);

/// Pairs (p, j) with p in [first_position, + rows), j in [begin, end) and j inside the window of p.
std::int64_t pairs_in_window(const Window& window, std::int64_t first_position, std::int64_t rows, std::int64_t begin,
                             std::int64_t end);

}  // namespace tessera
