// Sliding window: query position p sees keys j with p - left <= j <= p + right, both ends included, -1 = unlimited
// (FlashAttention's window_size). In causal problems the right end is at most the query itself.
#include <algorithm>

#include "methods/registry.h"
#include "score/plan_rows.h"

namespace tessera {
namespace {

struct SlidingWindow {
  struct Params {
    std::int64_t left = 1023;
    std::int64_t right = 0;
    void visit(ParameterList& v) {
      v("left", left, -1, kMostTokens, "keys before the query that it sees besides itself; -1 = all");
      v("right", right, -1, kMostTokens, "keys after the query that it sees (none when causal); -1 = all");
    }
  };
  static constexpr bool reads_inputs = false;
  static MethodInfo info() {
    return {.name = "window",
            .family = "pattern",
            .summary = "sliding window of keys around the query",
            .paper = "Longformer: The Long-Document Transformer, arXiv:2004.05150",
            .phases = {.prefill = true, .decode = true, .backward = true},
            .budget = {{"left", 15, 1 << 20, true}}};
  }

  std::int64_t prefill_tile() const { return 1; }

  Plan plan(const Problem& problem, const AttentionInputs&, const PlanContext& context) const {
    score::PlanRows rows(problem, 128, 128, 1, !problem.variable_length());
    const Window window{params.left, problem.causal ? 0 : params.right};
    const std::int64_t band = rows.add_band(window);
    for (std::int64_t block = 0; block < rows.blocks(); ++block) {
      const score::QueryTiles tiles = rows.geometry(block);
      for (std::int64_t tile = 0; tile < tiles.count(); ++tile) {
        const std::int64_t first = tiles.first_position(tile);
        const std::int64_t last = tiles.last_position(tile);
        const std::int64_t begin = window.left < 0 ? 0 : std::clamp<std::int64_t>(first - window.left, 0, tiles.keys);
        const std::int64_t end =
            window.right < 0 ? tiles.keys : std::clamp<std::int64_t>(last + window.right + 1, begin, tiles.keys);
        const bool whole =
            (window.left < 0 || begin >= last - window.left) && (window.right < 0 || end <= first + window.right + 1);
        rows.row(block, tile).run(begin, end, whole ? EntryMask::none : EntryMask::band, whole ? 0 : band);
      }
    }
    return std::move(rows).finish(context.run.threads);
  }

  Params params;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(window, tessera::SlidingWindow);
