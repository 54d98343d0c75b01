// A plan turned round for the key-major kernels: key tile -> the query tiles that selected it.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "kernels/cpu/tile.h"

namespace tessera::kernels {

/// A job's selections by key tile; within a tile first by mask, then by query.
class Selections {
 public:
  Selections(const Plan& plan, const KeyMajorJob& job) {
    const std::int64_t first_row = plan.row_begin[static_cast<std::size_t>(job.block)] + job.first_query / plan.tile_q;
    const std::int64_t rows = (job.queries + plan.tile_q - 1) / plan.tile_q;
    const std::int64_t key_tiles = (plan.problem.kv_len_of(job.sequence) + plan.tile_k - 1) / plan.tile_k;
    std::vector<std::int64_t> count(static_cast<std::size_t>(key_tiles) + 1, 0);
    const auto for_each = [&](auto&& body) {
      for (std::int64_t r = 0; r < rows; ++r) {
        const auto entries = plan.row(first_row + r);
        for (std::size_t e = 0; e < entries.size(); ++e) {
          for (std::int64_t t = 0; t < entries[e].count; ++t) {
            body(static_cast<std::size_t>(entries[e].begin + t), entries[e],
                 Selection{static_cast<std::int32_t>(r), static_cast<std::int32_t>(e)});
          }
        }
      }
    };
    for_each([&](std::size_t tile, const PlanEntry&, const Selection&) { ++count[tile + 1]; });
    for (std::size_t t = 1; t < count.size(); ++t) count[t] += count[t - 1];
    selections_.resize(static_cast<std::size_t>(count.back()));
    std::vector<std::int64_t> next(count.begin(), count.end() - 1);
    for_each([&](std::size_t tile, const PlanEntry&, const Selection& s) {
      selections_[static_cast<std::size_t>(next[tile]++)] = s;
    });
    const auto mask_of = [&](const Selection& s) {
      const PlanEntry& entry = plan.row(first_row + s.plan_row)[static_cast<std::size_t>(s.entry)];
      return std::pair(entry.mask, entry.mask_index);
    };
    for (std::int64_t t = 0; t < key_tiles; ++t) {
      const auto begin = selections_.begin() + count[static_cast<std::size_t>(t)];
      const auto end = selections_.begin() + count[static_cast<std::size_t>(t) + 1];
      if (begin == end) continue;
      std::stable_sort(begin, end, [&](const Selection& a, const Selection& b) { return mask_of(a) < mask_of(b); });
      tiles_.push_back(static_cast<std::int32_t>(t));
      begin_.push_back(count[static_cast<std::size_t>(t)]);
    }
    begin_.push_back(count.back());
  }

  SelectionsByTile view() const {
    return {tiles_.data(), begin_.data(), selections_.data(), static_cast<std::int64_t>(tiles_.size())};
  }

 private:
  std::vector<std::int32_t> tiles_;
  std::vector<std::int64_t> begin_;
  std::vector<Selection> selections_;
};

}  // namespace tessera::kernels
