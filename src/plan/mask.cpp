// Plans as dense boolean masks and back. Written pair by pair, independent of the interval code that it checks.
#include <algorithm>
#include <cstddef>

#include "core/error.h"
#include "plan/geometry.h"
#include "tessera/plan.h"

namespace tessera {

namespace {

constexpr double kLargestMask = 2147483648.0;  // 2^31 elements

void check_mask_size(const Problem& problem) {
  const double batch = problem.variable_length() ? 1.0 : static_cast<double>(problem.batch);
  const double size = batch * static_cast<double>(problem.q_heads) * static_cast<double>(problem.q_len) *
                      static_cast<double>(problem.kv_len);
  require(size <= kLargestMask, "a dense mask of {} elements is too large; expected at most 2^31", size);
}

std::int64_t mask_batch(const Problem& problem) {
  return problem.variable_length() ? 1 : problem.batch;
}

/// Where the rows and columns of one (sequence, query head) lie in a dense mask.
struct MaskWindow {
  std::int64_t origin = 0;  ///< element of (query 0, key 0)
  std::int64_t stride = 0;  ///< elements between queries

  MaskWindow(const Problem& problem, std::int64_t sequence, std::int64_t head)
      : origin(((problem.tensor_batch_of(sequence) * problem.q_heads + head) * problem.q_len +
                problem.q_begin_of(sequence)) *
                   problem.kv_len +
               problem.kv_begin_of(sequence)),
        stride(problem.kv_len) {}
};

bool pair_counts(const Plan& plan, const BlockView& view, const PlanEntry& entry, std::int64_t keys, std::int64_t place,
                 std::int64_t row, std::int64_t index, std::int64_t key) {
  switch (entry.mask) {
    case EntryMask::none:
      return true;
    case EntryMask::band:
      return window_contains(plan.bands[entry.mask_index], view.query_position(place), view.key_position(key));
    case EntryMask::bitmask:
      return (plan.mask_words[entry.mask_index + row * mask_words_of(keys) + index / 64] >> (index % 64) & 1) != 0;
  }
  return false;
}

}  // namespace

std::vector<std::uint8_t> dense_mask(const Plan& plan) {
  const Problem& problem = plan.problem;
  check_mask_size(problem);
  std::vector<std::uint8_t> mask(
      static_cast<std::size_t>(mask_batch(problem) * problem.q_heads * problem.q_len * problem.kv_len));
  for (std::int64_t sequence = 0; sequence < problem.batch; ++sequence) {
    for (std::int64_t head = 0; head < problem.q_heads; ++head) {
      const MaskWindow window(problem, sequence, head);
      const BlockView view(plan, plan.block_of(sequence, head));
      for (std::int64_t tile = 0; tile < view.tiles(); ++tile) {
        for (const PlanEntry& entry : plan.row(plan.row_begin[view.block] + tile)) {
          if (entry.source != 0) continue;
          const Plan::KeyRange keys = plan.keys_of(entry, view.block);
          for (std::int64_t row = 0; row < view.rows_of(tile); ++row) {
            const std::int64_t place = tile * plan.tile_q + row;
            const std::int64_t query = view.query_order.empty() ? place : view.query_order[place];
            for (std::int64_t i = 0; i < keys.count; ++i) {
              const std::int64_t key = entry.kind == EntryKind::gather ? plan.tokens[keys.begin + i] : keys.begin + i;
              if (pair_counts(plan, view, entry, keys.count, place, row, i, key)) {
                mask[window.origin + query * window.stride + view.key_position(key)] = 1;
              }
            }
          }
        }
      }
    }
  }
  return mask;
}

namespace {

/// Whether two (sequence, head) windows of the mask are equal.
bool same_window(const Problem& problem, std::span<const std::uint8_t> mask, std::int64_t sequence, std::int64_t head,
                 std::int64_t other_sequence, std::int64_t other_head) {
  const MaskWindow a(problem, sequence, head);
  const MaskWindow b(problem, other_sequence, other_head);
  const std::int64_t keys = problem.kv_len_of(sequence);
  for (std::int64_t q = 0; q < problem.q_len_of(sequence); ++q) {
    const auto* row = mask.data() + a.origin + q * a.stride;
    const auto same = [](std::uint8_t x, std::uint8_t y) { return (x != 0) == (y != 0); };
    if (!std::equal(row, row + keys, mask.data() + b.origin + q * b.stride, same)) return false;
  }
  return true;
}

/// Fewest plan heads that tell all differing query heads apart.
std::int64_t heads_that_differ(const Problem& problem, std::span<const std::uint8_t> mask) {
  bool same_for_all = true;
  for (std::int64_t s = 0; s < problem.batch; ++s) {
    for (std::int64_t h = 0; h < problem.q_heads; ++h) {
      if (!same_window(problem, mask, s, h, s, h - h % problem.group())) return problem.q_heads;
      same_for_all = same_for_all && same_window(problem, mask, s, h, s, 0);
    }
  }
  return same_for_all ? 1 : problem.kv_heads;
}

bool sequences_agree(const Problem& problem, std::span<const std::uint8_t> mask) {
  for (std::int64_t s = 1; s < problem.batch; ++s) {
    for (std::int64_t h = 0; h < problem.q_heads; ++h) {
      if (!same_window(problem, mask, s, h, 0, h)) return false;
    }
  }
  return true;
}

/// Adds what the mask holds in one tile of rows: whole tiles as tile entries, partial ones with a bitmask.
void add_mask_row(PlanBuilder& builder, std::span<const std::uint8_t> mask, const MaskWindow& window,
                  std::int64_t first_query, std::int64_t rows, std::int64_t keys) {
  std::int64_t whole_begin = 0;
  std::int64_t whole = 0;
  std::vector<std::uint64_t> words;
  for (std::int64_t tile = 0; tile * builder.tile_k() < keys; ++tile) {
    const std::int64_t begin = tile * builder.tile_k();
    const std::int64_t count = std::min(builder.tile_k(), keys - begin);
    words.assign(static_cast<std::size_t>(rows * mask_words_of(count)), 0);
    std::int64_t kept = 0;
    for (std::int64_t row = 0; row < rows; ++row) {
      const auto* from = mask.data() + window.origin + (first_query + row) * window.stride + begin;
      for (std::int64_t i = 0; i < count; ++i) {
        if (from[i] == 0) continue;
        words[row * mask_words_of(count) + i / 64] |= std::uint64_t{1} << (i % 64);
        ++kept;
      }
    }
    if (kept == rows * count) {
      if (whole == 0) whole_begin = tile;
      ++whole;
      continue;
    }
    builder.tiles(whole_begin, whole);
    whole = 0;
    if (kept != 0) builder.tiles(tile, 1, EntryMask::bitmask, builder.add_mask(words));
  }
  builder.tiles(whole_begin, whole);
}

}  // namespace

Plan plan_from_mask(const Problem& problem, std::span<const std::uint8_t> mask, std::int64_t tile_q,
                    std::int64_t tile_k) {
  problem.validate();
  check_mask_size(problem);
  const auto size = static_cast<std::size_t>(mask_batch(problem) * problem.q_heads * problem.q_len * problem.kv_len);
  require(mask.size() == size, "mask has {} elements; the problem needs {}", mask.size(), size);

  const std::int64_t heads = heads_that_differ(problem, mask);
  const bool shared = !problem.variable_length() && sequences_agree(problem, mask);
  PlanBuilder builder(problem, tile_q, tile_k, heads, shared ? 1 : problem.batch);
  for (std::int64_t s = 0; s < (shared ? 1 : problem.batch); ++s) {
    for (std::int64_t h = 0; h < heads; ++h) {
      const MaskWindow window(problem, s, h * (problem.q_heads / heads));
      for (std::int64_t first = 0; first < problem.q_len_of(s); first += tile_q) {
        add_mask_row(builder, mask, window, first, std::min(tile_q, problem.q_len_of(s) - first), problem.kv_len_of(s));
        builder.end_row();
      }
    }
  }
  Plan plan = std::move(builder).finish();
  validate(plan);
  return plan;
}

}  // namespace tessera
