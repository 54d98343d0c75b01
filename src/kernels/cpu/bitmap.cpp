// Schedules attention over bitmap-compressed tokens: pieces of a fixed number of batches, merged in order.
#include "kernels/bitmap_attention.h"

#include "core/parallel.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/piece_states.h"

namespace tessera::kernels {

namespace {

constexpr std::int64_t kPieceGroups = 32;  // 2,048 tokens

struct Piece {
  std::size_t head;
  std::size_t first_batch;
  std::size_t last_batch;
};

std::vector<Piece> cut(std::span<const BitmapHead> heads) {
  std::vector<Piece> pieces;
  for (std::size_t head = 0; head < heads.size(); ++head) {
    const std::vector<BitmapTiles>& batches = heads[head].keys;
    std::int64_t groups = 0;
    std::size_t first = 0;
    for (std::size_t batch = 0; batch < batches.size(); ++batch) {
      groups += batches[batch].groups;
      if (groups < kPieceGroups && batch + 1 < batches.size()) continue;
      pieces.push_back({head, first, batch + 1});
      first = batch + 1;
      groups = 0;
    }
  }
  return pieces;
}

}  // namespace

void attend_bitmap(const BitmapProblem& problem, std::span<const BitmapHead> heads, const float* queries, float* o,
                   float* lse, const RunOptions& options) {
  const LevelKernels& level = level_of(options.isa.value_or(default_isa()));
  const std::vector<Piece> pieces = cut(heads);
  const std::vector<float> scaled =
      scaled_queries(queries, std::ssize(heads) * problem.rows, problem.head_dim, problem.head_dim, problem.scale);
  PieceStates states(std::ssize(pieces), problem.rows, output_columns(problem.value_dim));
  const auto attend = [&](std::int64_t i, int) {
    const Piece& piece = pieces[static_cast<std::size_t>(i)];
    const BitmapHead& head = heads[piece.head];
    const float* own = scaled.data() + static_cast<std::int64_t>(piece.head) * problem.rows * problem.head_dim;
    for (std::size_t batch = piece.first_batch; batch < piece.last_batch; ++batch) {
      level.attend_bitmap(problem, head.keys[batch], head.values[batch], own, states.maximum(i), states.sum(i),
                          states.output(i));
    }
  };
  parallel_for(std::ssize(pieces), options.threads, attend);

  merge_heads(states, pieces, std::ssize(heads), problem.rows, problem.value_dim, o, lse);
}

}  // namespace tessera::kernels
