// Key tile -> query tiles.
#include <algorithm>

#include "plan/geometry.h"
#include "tessera/plan.h"

namespace tessera {

namespace {

/// visit(key tile) for every key tile of source 0 that a row names, each once, ascending within an entry.
/// `last_row` [key tiles of the block] remembers which row saw a tile last.
template <class Visit>
void for_each_key_tile(const Plan& plan, std::int64_t block, std::int64_t row, std::vector<std::int64_t>& last_row,
                       const Visit& visit) {
  const auto see = [&](std::int64_t tile) {
    if (last_row[tile] == row) return;
    last_row[tile] = row;
    visit(tile);
  };
  for (const PlanEntry& entry : plan.row(row)) {
    if (entry.source != 0) continue;
    const Plan::KeyRange keys = plan.keys_of(entry, block);
    if (entry.kind == EntryKind::gather) {
      for (std::int64_t i = 0; i < keys.count; ++i) see(plan.tokens[keys.begin + i] / plan.tile_k);
    } else {
      const std::int64_t last = (keys.begin + keys.count - 1) / plan.tile_k;
      for (std::int64_t tile = keys.begin / plan.tile_k; tile <= last; ++tile) see(tile);
    }
  }
}

}  // namespace

PlanTranspose transpose(const Plan& plan) {
  PlanTranspose result;
  result.tile_k = plan.tile_k;
  result.key_tile_begin.push_back(0);
  const std::int64_t blocks = plan.plan_heads * plan.plan_sequences;
  for (std::int64_t b = 0; b < blocks; ++b) {
    result.key_tile_begin.push_back(result.key_tile_begin.back() + ceil_div(plan.source_keys(0, b), plan.tile_k));
  }

  // Count, add up, fill: rows come out ascending because they are walked in order.
  result.offsets.assign(static_cast<std::size_t>(result.key_tile_begin.back() + 1), 0);
  std::vector<std::int64_t> last_row;
  const auto walk = [&](const auto& visit) {
    for (std::int64_t b = 0; b < blocks; ++b) {
      const std::int64_t first_tile = result.key_tile_begin[b];
      last_row.assign(static_cast<std::size_t>(result.key_tile_begin[b + 1] - first_tile), -1);
      for (std::int64_t row = plan.row_begin[b]; row < plan.row_begin[b + 1]; ++row) {
        for_each_key_tile(plan, b, row, last_row,
                          [&](std::int64_t tile) { visit(first_tile + tile, row - plan.row_begin[b]); });
      }
    }
  };
  walk([&](std::int64_t tile, std::int64_t) { ++result.offsets[tile + 1]; });
  for (std::size_t t = 1; t < result.offsets.size(); ++t) result.offsets[t] += result.offsets[t - 1];
  result.rows.resize(static_cast<std::size_t>(result.offsets.back()));
  std::vector<std::int64_t> next(result.offsets.begin(), result.offsets.end() - 1);
  walk([&](std::int64_t tile, std::int64_t row) { result.rows[next[tile]++] = static_cast<std::int32_t>(row); });
  return result;
}

}  // namespace tessera
