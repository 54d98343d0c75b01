// Schedules the split-key kernel: each plan row is cut into pieces of a fixed number of keys, which threads share out;
// pieces merge in their order, so the result does not depend on who did what.
#include <algorithm>
#include <vector>

#include "core/parallel.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/packed_sources.h"
#include "kernels/cpu/schedule.h"

namespace tessera::kernels {

namespace {

constexpr std::int64_t kPieceKeys = 2048;
constexpr std::int64_t kSharesPerThread = 8;
/// Numbers of all pieces that one thread merges before a second one has started.
constexpr std::size_t kFewNumbers = 1 << 14;

struct Row {
  TileJob job;
  std::size_t pair;
  std::int64_t first_piece;
  std::int64_t pieces;
};

struct Work {
  std::vector<Row> rows;
  std::vector<SplitPiece> pieces;
  std::vector<std::size_t> row_of_piece;
};

/// Cuts the entries of a plan row into pieces; a row without keys still gets one, which writes its empty result.
void add_row(const Plan& plan, const TileJob& job, std::size_t pair, Work& work) {
  Row row{job, pair, static_cast<std::int64_t>(work.pieces.size()), 0};
  const std::int64_t end = plan.entry_begin[static_cast<std::size_t>(job.plan_row) + 1];
  std::int64_t entry = plan.entry_begin[static_cast<std::size_t>(job.plan_row)];
  SplitPiece piece{entry, 0, 0};
  std::int64_t offset = 0;
  while (entry < end) {
    const std::int64_t keys = plan.keys_of(plan.entries[static_cast<std::size_t>(entry)], job.block).count;
    const std::int64_t taken = std::min(keys - offset, kPieceKeys - piece.keys);
    piece.keys += taken;
    offset += taken;
    if (offset == keys) {
      ++entry;
      offset = 0;
    }
    if (piece.keys == kPieceKeys) {
      work.pieces.push_back(piece);
      piece = {entry, offset, 0};
    }
  }
  if (piece.keys > 0 || static_cast<std::int64_t>(work.pieces.size()) == row.first_piece) work.pieces.push_back(piece);
  row.pieces = static_cast<std::int64_t>(work.pieces.size()) - row.first_piece;
  work.row_of_piece.resize(work.pieces.size(), work.rows.size());
  work.rows.push_back(row);
}

Work cut(const Call& call) {
  const Plan& plan = call.plan;
  const Problem& problem = call.problem();
  const std::int64_t shared = heads_per_row(plan);
  Work work;
  for (std::int64_t sequence = 0; sequence < problem.batch; ++sequence) {
    for (std::int64_t kv_head = 0; kv_head < problem.kv_heads; ++kv_head) {
      const auto pair = static_cast<std::size_t>(sequence * problem.kv_heads + kv_head);
      const std::int64_t first_head = kv_head * problem.group();
      for (std::int64_t head = first_head; head < first_head + problem.group();) {
        const std::int64_t block = plan.block_of(sequence, head);
        const std::int64_t queries = plan.queries_of(block);
        const std::int64_t shared_end = head - (head - first_head) % shared + shared;
        const std::int64_t places = std::min({plan.tile_q, queries, kTileRows});
        const std::int64_t heads =
            std::clamp(kTileRows / std::max<std::int64_t>(1, places), std::int64_t{1}, shared_end - head);
        for (std::int64_t tile = 0; tile < queries; tile += plan.tile_q) {
          const std::int64_t tile_end = std::min(tile + plan.tile_q, queries);
          for (std::int64_t place = tile; place < tile_end; place += kTileRows) {
            TileJob job;
            job.sequence = sequence;
            job.block = block;
            job.plan_row = plan.row_begin[static_cast<std::size_t>(block)] + tile / plan.tile_q;
            job.first_head = head;
            job.heads = heads;
            job.first_place = place;
            job.places = std::min(kTileRows, tile_end - place);
            add_row(plan, job, pair, work);
          }
        }
        head += heads;
      }
    }
  }
  return work;
}

}  // namespace

std::size_t run_split_key(const Call& call, const LevelKernels& level) {
  const Problem& problem = call.problem();
  const TileShape shape = shape_of_call(call, level);
  const ScoreRule rule = score_rule_of(call, shape);
  const Work work = cut(call);

  std::vector<PackedSources::Pair> pairs;
  for (std::int64_t i = 0; i < problem.batch * problem.kv_heads; ++i) {
    pairs.push_back({i / problem.kv_heads, i % problem.kv_heads});
  }
  const PackedSources sources(call, shape, level, std::move(pairs), {});  // nothing packed: rows are read in place

  // Results of the pieces: [pieces of a row][rows of its job], row after row.
  std::vector<std::size_t> state_begin(work.rows.size() + 1, 0);
  for (std::size_t r = 0; r < work.rows.size(); ++r) {
    state_begin[r + 1] = state_begin[r] + static_cast<std::size_t>(work.rows[r].pieces * work.rows[r].job.rows());
  }
  const auto columns = static_cast<std::size_t>(shape.value_columns);
  std::vector<float> maximum(state_begin.back());
  std::vector<float> sum(state_begin.back());
  const BorrowedBuffer output_memory(call.workspace, state_begin.back() * columns * sizeof(float));
  auto* output = reinterpret_cast<float*>(output_memory.data());

  ThreadScratch scratch(call, shape, true);
  const auto pieces = static_cast<std::int64_t>(work.pieces.size());
  // Neighbouring pieces to one thread: the keys that it asks for ahead at the end of a piece are those it reads next.
  const std::int64_t together = std::max<std::int64_t>(1, pieces / (kSharesPerThread * thread_count(call.threads)));
  const auto merge = [&](std::size_t r) {
    const Row& row = work.rows[r];
    const std::size_t state = state_begin[r];
    level.merge_pieces(call, shape, rule, row.job, row.pieces, maximum.data() + state, sum.data() + state,
                       output + state * columns);
  };
  const auto attend = [&](std::int64_t i, int thread) {
    const std::size_t r = work.row_of_piece[static_cast<std::size_t>(i)];
    const Row& row = work.rows[r];
    const std::size_t state = state_begin[r] + static_cast<std::size_t>((i - row.first_piece) * row.job.rows());
    level.attend_piece(call, shape, rule, row.job, work.pieces[static_cast<std::size_t>(i)], sources.of(row.pair),
                       scratch.of(thread), maximum.data() + state, sum.data() + state, output + state * columns);
    if (row.pieces == 1) merge(r);  // by the thread that has the results at hand
  };
  parallel_for(pieces, call.threads, attend, together);
  std::vector<std::size_t> cut_rows;
  for (std::size_t r = 0; r < work.rows.size(); ++r) {
    if (work.rows[r].pieces > 1) cut_rows.push_back(r);
  }
  const bool few = state_begin.back() * columns < kFewNumbers;
  parallel_for(std::ssize(cut_rows), few ? 1 : call.threads,
               [&](std::int64_t i, int) { merge(cut_rows[static_cast<std::size_t>(i)]); });
  return scratch.bytes() + state_begin.back() * (columns + 2) * sizeof(float);
}

}  // namespace tessera::kernels
