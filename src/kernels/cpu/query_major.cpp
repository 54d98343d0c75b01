// Schedules the query-major kernel: waves of kv heads whose packed keys fit the workspace, tiles of rows in each wave
// handed out longest first.
#include <algorithm>
#include <vector>

#include "core/parallel.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/packed_sources.h"
#include "kernels/cpu/schedule.h"

namespace tessera::kernels {

namespace {

/// Tiles of one (sequence, kv head). A plan row that several heads share becomes one job of all of them while its rows
/// fit a tile, else one job per head.
void add_jobs(const Call& call, std::int64_t sequence, std::int64_t kv_head, std::vector<TileJob>& jobs) {
  const Plan& plan = call.plan;
  const Problem& problem = plan.problem;
  const std::int64_t first_head = kv_head * problem.group();
  const std::int64_t shared = heads_per_row(plan);
  // Row groups of the online skip belong to one head.
  const std::int64_t heads_per_job =
      call.online_skip.used() ? 1 : std::clamp(kTileRows / plan.tile_q, std::int64_t{1}, shared);
  for (std::int64_t head = first_head; head < first_head + problem.group();) {
    const std::int64_t shared_end =
        std::min(first_head + problem.group(), head - (head - first_head) % shared + shared);
    const std::int64_t heads = std::min(heads_per_job, shared_end - head);
    const std::int64_t block = plan.block_of(sequence, head);
    const std::int64_t queries = plan.queries_of(block);
    for (std::int64_t place = 0; place < queries; place += plan.tile_q) {
      TileJob job;
      job.sequence = sequence;
      job.block = block;
      job.plan_row = plan.row_begin[static_cast<std::size_t>(block)] + place / plan.tile_q;
      job.first_head = head;
      job.heads = heads;
      job.first_place = place;
      job.places = std::min(plan.tile_q, queries - place);
      for (const PlanEntry& entry : plan.row(job.plan_row)) job.work += plan.keys_of(entry, block).count;
      job.work *= job.rows();
      jobs.push_back(job);
    }
    head += heads;
  }
}

/// Is it worth packing all keys of the sequence once? Not when the jobs touch fewer keys than that in all.
PackedSources::Wish wish_for(const Call& call, const TileShape& shape, std::int64_t sequence,
                             const std::vector<TileJob>& jobs) {
  PackedSources::Wish wish;
  wish.scan = true;
  std::int64_t touched = 0;
  for (const TileJob& job : jobs) touched += job.work / std::max<std::int64_t>(1, job.rows());
  const bool permuted = !call.plan.key_order.empty();
  if (permuted || touched < 2 * call.problem().kv_len_of(sequence)) return wish;
  wish.keys = true;
  // 16-bit values that are multiplied as floats are widened from their rows as fast as from a packed copy.
  wish.values = !shape.k_widens();
  if (PackedSources::bytes_of(call, shape, sequence, wish) > call.workspace_bytes) wish.values = false;
  if (PackedSources::bytes_of(call, shape, sequence, wish) > call.workspace_bytes) wish.keys = false;
  return wish;
}

bool operator==(const PackedSources::Wish& a, const PackedSources::Wish& b) {
  return a.keys == b.keys && a.values == b.values;
}

}  // namespace

std::size_t run_query_major(const Call& call, const LevelKernels& level, std::int64_t* skipped_pairs) {
  const Problem& problem = call.problem();
  const TileShape shape = shape_of_call(call, level);
  const ScoreRule rule = score_rule_of(call, shape);
  ThreadScratch scratch(call, shape, true);
  const MutableTensorView& tile_maximum = call.outputs.tile_maximum;
  const std::int64_t key_tiles = tile_maximum.data == nullptr ? 0 : tile_maximum.shape[3];
  std::vector<float> tile_peaks(static_cast<std::size_t>(call.threads * kTileRows * key_tiles));
  for (int thread = 0; thread < call.threads; ++thread) {
    TileScratch& own = scratch.of(thread);
    own.tile_peak = tile_maximum.data == nullptr ? nullptr : tile_peaks.data() + thread * kTileRows * key_tiles;
    own.tile_peak_count = key_tiles;
  }

  std::size_t most_packed = 0;
  const std::int64_t pairs = problem.batch * problem.kv_heads;
  for (std::int64_t pair = 0; pair < pairs;) {
    // A wave: as many (sequence, kv head) pairs as the workspace holds, at least one.
    std::vector<PackedSources::Pair> wave;
    std::vector<TileJob> jobs;
    std::vector<std::size_t> job_pair;
    PackedSources::Wish wish;
    std::size_t bytes = 0;
    for (; pair < pairs; ++pair) {
      const std::int64_t sequence = pair / problem.kv_heads;
      std::vector<TileJob> added;
      add_jobs(call, sequence, pair % problem.kv_heads, added);
      const PackedSources::Wish own = wish_for(call, shape, sequence, added);
      const std::size_t own_bytes = PackedSources::bytes_of(call, shape, sequence, own);
      if (!wave.empty() && (!(own == wish) || bytes + own_bytes > call.workspace_bytes)) break;
      wish = own;
      bytes += own_bytes;
      jobs.insert(jobs.end(), added.begin(), added.end());
      job_pair.resize(jobs.size(), wave.size());
      wave.push_back({sequence, pair % problem.kv_heads});
    }
    const PackedSources packed(call, shape, level, std::move(wave), wish);
    most_packed = std::max(most_packed, packed.bytes());

    std::vector<std::size_t> order(jobs.size());
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(),
                     [&](std::size_t a, std::size_t b) { return jobs[a].work > jobs[b].work; });
    parallel_for(static_cast<std::int64_t>(jobs.size()), call.threads, [&](std::int64_t i, int thread) {
      const std::size_t job = order[static_cast<std::size_t>(i)];
      level.attend_tile(call, shape, rule, jobs[job], packed.of(job_pair[job]), scratch.of(thread));
    });
  }
  for (int thread = 0; thread < call.threads && skipped_pairs != nullptr; ++thread) {
    *skipped_pairs += scratch.of(thread).skipped_pairs;
  }
  return most_packed + scratch.bytes() + tile_peaks.size() * sizeof(float);
}

}  // namespace tessera::kernels
