// Schedules attention over bitmap-compressed tokens: pieces of a fixed number of batches, merged in order.
#include "kernels/bitmap_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>

#include "core/parallel.h"
#include "kernels/cpu/cpu.h"

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
  const std::int64_t columns = (problem.value_dim + kBitmapTile - 1) / kBitmapTile * kBitmapTile;
  const auto rows = static_cast<std::size_t>(problem.rows);
  // Scores in powers of 2, so that the kernel's exponentials need no factor.
  std::vector<float> scaled(heads.size() * rows * static_cast<std::size_t>(problem.head_dim));
  for (std::size_t i = 0; i < scaled.size(); ++i) {
    scaled[i] = queries[i] * problem.scale * std::numbers::log2e_v<float>;
  }
  std::vector<float> maximum(pieces.size() * rows);
  std::vector<float> sum(maximum.size());
  std::vector<float> output(maximum.size() * static_cast<std::size_t>(columns));
  const auto attend = [&](std::int64_t i, int) {
    const Piece& piece = pieces[static_cast<std::size_t>(i)];
    const std::size_t state = static_cast<std::size_t>(i) * rows;
    const BitmapHead& head = heads[piece.head];
    std::fill_n(maximum.begin() + static_cast<std::ptrdiff_t>(state), rows, -std::numeric_limits<float>::infinity());
    for (std::size_t batch = piece.first_batch; batch < piece.last_batch; ++batch) {
      level.attend_bitmap(problem, head.keys[batch], head.values[batch],
                          scaled.data() + piece.head * rows * static_cast<std::size_t>(problem.head_dim),
                          maximum.data() + state, sum.data() + state,
                          output.data() + state * static_cast<std::size_t>(columns));
    }
  };
  parallel_for(static_cast<std::int64_t>(pieces.size()), options.threads, attend);

  for (std::size_t head = 0; head < heads.size(); ++head) {
    const auto begin = std::find_if(pieces.begin(), pieces.end(), [&](const Piece& p) { return p.head == head; });
    const auto end = std::find_if(begin, pieces.end(), [&](const Piece& p) { return p.head != head; });
    for (std::size_t row = 0; row < rows; ++row) {
      const auto state_of = [&](auto piece) { return static_cast<std::size_t>(piece - pieces.begin()) * rows + row; };
      float highest = -std::numeric_limits<float>::infinity();
      for (auto piece = begin; piece != end; ++piece) highest = std::max(highest, maximum[state_of(piece)]);
      float total = 0;
      std::vector<float> joined(static_cast<std::size_t>(problem.value_dim), 0.0F);
      for (auto piece = begin; piece != end; ++piece) {
        const std::size_t state = state_of(piece);
        const float factor = maximum[state] == highest ? 1.0F : std::exp2(maximum[state] - highest);
        total += sum[state] * factor;
        const float* part = output.data() + state * static_cast<std::size_t>(columns);
        for (std::size_t d = 0; d < joined.size(); ++d) joined[d] += part[d] * factor;
      }
      const std::size_t out = head * rows + row;
      lse[out] = begin == end ? highest : (highest + std::log2(total)) * std::numbers::ln2_v<float>;
      for (std::size_t d = 0; d < joined.size(); ++d) {
        o[out * joined.size() + d] = begin == end ? 0.0F : joined[d] / total;
      }
    }
  }
}

}  // namespace tessera::kernels
