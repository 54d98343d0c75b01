// Schedules the key-major kernel: chunks of queries, and for each the plan turned round (key tile -> query tiles).
#include <algorithm>
#include <vector>

#include "core/parallel.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/packed_sources.h"
#include "kernels/cpu/schedule.h"
#include "kernels/cpu/selections.h"

namespace tessera::kernels {

namespace {

/// Query rows of a chunk. Its accumulators (2 to 4 MiB at head_dim 128) live in the shared cache while every key tile
/// is visited once; the size is fixed so that results do not depend on the threads.
constexpr std::int64_t kChunkRows = 4096;

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
