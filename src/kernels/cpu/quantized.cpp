// Schedules attention over quantised tokens: pieces of a fixed number of blocks, merged in order.
#include <algorithm>

#include "core/parallel.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/piece_states.h"
#include "kernels/quantized_attention.h"

namespace tessera::kernels {

namespace {

constexpr std::int64_t kPieceBlocks = 32;  // 2,048 tokens

/// Blocks [first, last) of a batch.
struct Span {
  std::size_t batch;
  std::int64_t first;
  std::int64_t last;
};

/// Spans [first, last) of a head.
struct Piece {
  std::size_t head;
  std::size_t first;
  std::size_t last;
};

/// Long batches are cut, short ones put together.
void cut(std::span<const QuantizedHead> heads, std::vector<Span>& spans, std::vector<Piece>& pieces) {
  for (std::size_t head = 0; head < heads.size(); ++head) {
    std::size_t begin = spans.size();
    std::int64_t blocks = 0;
    for (std::size_t batch = 0; batch < heads[head].keys.size(); ++batch) {
      const std::int64_t count = heads[head].keys[batch].blocks();
      for (std::int64_t first = 0; first < count;) {
        const std::int64_t last = std::min(count, first + kPieceBlocks - blocks);
        spans.push_back({batch, first, last});
        blocks += last - first;
        first = last;
        if (blocks < kPieceBlocks) continue;
        pieces.push_back({head, begin, spans.size()});
        begin = spans.size();
        blocks = 0;
      }
    }
    if (blocks > 0) pieces.push_back({head, begin, spans.size()});
  }
}

}  // namespace

void attend_quantized(const QuantizedProblem& problem, std::span<const QuantizedHead> heads, const float* queries,
                      float* o, float* lse, const RunOptions& options) {
  const LevelKernels& level = level_of(options.isa.value_or(default_isa()));
  std::vector<Span> spans;
  std::vector<Piece> pieces;
  cut(heads, spans, pieces);
  const std::int64_t stride = quantized_query_stride(problem.head_dim);
  const std::vector<float> scaled =
      scaled_queries(queries, std::ssize(heads) * problem.rows, problem.head_dim, stride, problem.scale);
  PieceStates states(std::ssize(pieces), problem.rows, output_columns(problem.value_dim));
  const std::size_t scratch_bytes = quantized_scratch_bytes(problem.head_dim);
  std::vector<std::byte> scratch(scratch_bytes * static_cast<std::size_t>(thread_count(options.threads)));
  parallel_for(std::ssize(pieces), options.threads, [&](std::int64_t i, int thread) {
    const Piece& piece = pieces[static_cast<std::size_t>(i)];
    const QuantizedHead& head = heads[piece.head];
    const float* own = scaled.data() + static_cast<std::int64_t>(piece.head) * problem.rows * stride;
    for (std::size_t s = piece.first; s < piece.last; ++s) {
      const Span& span = spans[s];
      level.attend_quantized(problem, head.keys[span.batch], head.values[span.batch], span.first, span.last, own,
                             states.maximum(i), states.sum(i), states.output(i),
                             scratch.data() + static_cast<std::size_t>(thread) * scratch_bytes);
    }
  });
  merge_heads(states, pieces, std::ssize(heads), problem.rows, problem.value_dim, o, lse);
}

}  // namespace tessera::kernels
