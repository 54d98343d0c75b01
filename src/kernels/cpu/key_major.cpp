// Schedules the key-major kernel: chunks of queries, and for each the plan turned round (key tile -> query tiles).
#include <algorithm>
#include <vector>

#include "core/parallel.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/packed_sources.h"
#include "kernels/cpu/schedule.h"

namespace tessera::kernels {

namespace {

/// Query rows of a chunk. Its accumulators (2 to 4 MiB at head_dim 128) live in the shared cache while every key tile
/// is visited once; the size is fixed so that results do not depend on the threads.
constexpr std::int64_t kChunkRows = 4096;

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

}  // namespace

bool can_run_key_major(const Plan& plan) {
  if (plan.sources.size() != 1 || !plan.query_order.empty() || !plan.key_order.empty()) return false;
  return std::all_of(plan.entries.begin(), plan.entries.end(), [](const PlanEntry& entry) {
    return entry.kind == EntryKind::tile && entry.mask != EntryMask::bitmask;
  });
}

std::size_t run_key_major(const Call& call, const LevelKernels& level) {
  const Plan& plan = call.plan;
  const Problem& problem = call.problem();
  const TileShape shape = shape_of_call(call, level);
  const ScoreRule rule = score_rule_of(call, shape);
  const std::int64_t heads = heads_per_row(plan);
  const std::int64_t chunk_queries = std::max<std::int64_t>(1, kChunkRows / heads / plan.tile_q) * plan.tile_q;
  ThreadScratch scratch(call, shape, false);
  const auto accumulator_bytes =
      static_cast<std::size_t>(key_major_accumulator_floats(shape, chunk_queries * heads)) * sizeof(float);
  const BorrowedBuffer accumulators(call.workspace, accumulator_bytes * static_cast<std::size_t>(call.threads));

  std::size_t most_packed = 0;
  for (std::int64_t sequence = 0; sequence < problem.batch; ++sequence) {
    PackedSources::Wish wish{true, !shape.k_widens(), true};
    if (PackedSources::bytes_of(call, shape, sequence, wish) > call.workspace_bytes) wish.values = false;
    if (PackedSources::bytes_of(call, shape, sequence, wish) > call.workspace_bytes) wish.keys = false;
    for (std::int64_t kv_head = 0; kv_head < problem.kv_heads; ++kv_head) {
      std::vector<KeyMajorJob> jobs;
      const std::int64_t first_head = kv_head * problem.group();
      for (std::int64_t head = first_head; head < first_head + problem.group(); head += heads) {
        const std::int64_t block = plan.block_of(sequence, head);
        const std::int64_t queries = problem.q_len_of(sequence);
        for (std::int64_t q = 0; q < queries; q += chunk_queries) {
          jobs.push_back({sequence, block, head, heads, q, std::min(chunk_queries, queries - q)});
        }
      }
      std::reverse(jobs.begin(), jobs.end());  // later queries see more keys
      const PackedSources packed(call, shape, level, {{sequence, kv_head}}, wish);
      most_packed = std::max(most_packed, packed.bytes());
      parallel_for(static_cast<std::int64_t>(jobs.size()), call.threads, [&](std::int64_t i, int thread) {
        const KeyMajorJob& job = jobs[static_cast<std::size_t>(i)];
        const Selections selections(plan, job);
        auto* own =
            reinterpret_cast<float*>(accumulators.data() + accumulator_bytes * static_cast<std::size_t>(thread));
        level.attend_key_major(call, shape, rule, job, selections.view(), packed.of(0), scratch.of(thread), own);
      });
    }
  }
  return most_packed + scratch.bytes() + accumulator_bytes * static_cast<std::size_t>(call.threads);
}

}  // namespace tessera::kernels
