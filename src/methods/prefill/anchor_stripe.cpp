// AnchorAttention: Difference-Aware Sparse Attention with Stripe Granularity, arXiv:2505.23520.
//
// Queries are taken in super-tiles of `step` query tiles. Their anchor, the first key tiles and everything from the
// start of the super-tile to the diagonal, is computed exactly. Its row maxima say what a score is worth: a key between
// the two regions is kept when, for the mean query of one of the tiles, scale qbar.k + theta >= the mean of the tile's
// row maxima. The keys kept for any tile of a super-tile (stripes) are computed for all of them, and both parts are one
// softmax. Rows behind the last whole super-tile are dense.
//
// Differs from the authors' code: anchor and stripes part the keys exactly (the code's anchor takes a whole super-tile
// at the beginning while its stripes start after one tile, so that some keys count twice, and the tile before each
// super-tile is never looked at); a length that is a multiple of the super-tile has no dense tail instead of failing;
// theta is in natural units throughout. Super-tiles count from the first query of the call. Scores that are NaN are
// kept.
#include <algorithm>
#include <cmath>

#include "core/parallel.h"
#include "methods/registry.h"
#include "methods/two_phases.h"
#include "score/plan_rows.h"
#include "score/pooled_tiles.h"
#include "score/product.h"
#include "score/row_access.h"

namespace tessera {
namespace {

constexpr std::int64_t kSupersAtOnce = 8;  ///< rows of one matrix product: that many super-tiles of `step` tiles
constexpr std::int64_t kPanelKeys = 256;

/// Where the regions of one (sequence, head) lie.
struct Regions {
  score::QueryTiles tiles;
  std::int64_t init;        ///< keys of the first region
  std::int64_t step;        ///< query tiles per super-tile
  std::int64_t local;       ///< super-tiles that the second region reaches back, the own one included
  std::int64_t super_rows;  ///< query rows per super-tile

  /// Whole super-tiles; what follows is dense.
  std::int64_t supers() const { return tiles.queries / super_rows; }
  bool dense(std::int64_t tile) const { return tile / step >= supers(); }
  /// First key of the second region.
  std::int64_t local_begin(std::int64_t super) const {
    const std::int64_t first = tiles.offset + (super - local + 1) * super_rows;
    return std::clamp<std::int64_t>(first, 0, tiles.keys);
  }
};

class AnchorStripe {
 public:
  struct Params {
    std::int64_t block = 128;
    std::int64_t step = 16;
    double theta = 12;
    std::int64_t init = 1;
    std::int64_t local = 1;
    void visit(ParameterList& v) {
      v("block", block, 16, 1024, "rows of query tiles, keys of the first tiles");
      v("step", step, 1, 1024, "query tiles per super-tile, which share their stripes");
      v("theta", theta, -1e30, 1e30,
        "natural-log distance below the anchor's row maximum down to which keys are kept; large keeps everything");
      v("init", init, 1, 1024, "key tiles at the beginning that every query computes");
      v("local", local, 1, 1024, "super-tiles before the diagonal that are computed exactly, the own one included");
    }
  };
  static MethodInfo info() {
    return {.name = "anchor-stripe",
            .family = "prefill",
            .summary = "keys whose score with a mean query comes near the row maximum of an exact anchor region",
            .paper = "AnchorAttention: Difference-Aware Sparse Attention with Stripe Granularity, arXiv:2505.23520",
            .phases = {.prefill = true, .decode = false},
            .domain = {.bidirectional = false, .reason = "its anchor ends at the diagonal"},
            .budget = {{"theta", -20, 40}}};
  }

  explicit AnchorStripe(Params params) : params_(params) {}

  std::int64_t prefill_tile() const { return params_.step * params_.block; }

  Plan plan(const Problem& problem, const AttentionInputs& inputs, const PlanContext& context) const {
    return plan_two_phases(anchor(problem, context.run.threads), inputs, context,
                           [&](const RowStatistics& exact) { return stripes(problem, inputs, context, exact); });
  }

  RunReport attend(const Problem& problem, const AttentionInputs& inputs, const AttentionOutputs& outputs,
                   const PlanContext& context, Plan* executed) const {
    return attend_two_phases(anchor(problem, context.run.threads), inputs, outputs, context, executed,
                             [&](const RowStatistics& exact) { return stripes(problem, inputs, context, exact); });
  }

 private:
  Regions regions(const Problem& problem, std::int64_t sequence) const {
    return {.tiles = {problem, sequence, params_.block, params_.block},
            .init = params_.init * params_.block,
            .step = params_.step,
            .local = params_.local,
            .super_rows = params_.step * params_.block};
  }

  Plan anchor(const Problem& problem, int threads) const {
    score::PlanRows rows(problem, params_.block, params_.block, problem.q_heads);
    parallel_for(rows.blocks(), threads, [&](std::int64_t block, int) {
      const Regions own = regions(problem, rows.sequence_of(block));
      for (std::int64_t t = 0; t < own.tiles.count(); ++t) {
        const std::int64_t local = own.dense(t) ? 0 : own.local_begin(t / own.step);
        score::PlanRow& row = rows.row(block, t);
        row.visible_run(own.tiles, t, 0, std::min(own.init, local));
        row.visible_run(own.tiles, t, local > own.init ? local : std::min(own.init, local), own.tiles.keys);
      }
    });
    return std::move(rows).finish(threads);
  }

  /// The second phase: per super-tile one list of keys.
  Plan stripes(const Problem& problem, const AttentionInputs& inputs, const PlanContext& context,
               const RowStatistics& exact) const {
    const std::int64_t blocks = problem.batch * problem.q_heads;
    std::int64_t most_supers = 0;
    for (std::int64_t s = 0; s < problem.batch; ++s) {
      most_supers = std::max(most_supers, regions(problem, s).supers());
    }
    std::vector<std::vector<std::vector<std::int32_t>>> lists(static_cast<std::size_t>(blocks));
    std::vector<std::vector<float>> means(static_cast<std::size_t>(blocks));
    parallel_for(blocks, context.run.threads, [&](std::int64_t block, int) {
      lists[block].resize(static_cast<std::size_t>(regions(problem, block / problem.q_heads).supers()));
      means[block] = score::pool_queries(problem, inputs, block / problem.q_heads, block % problem.q_heads,
                                         params_.block, score::LastTile::real_rows);
    });
    const std::int64_t chunks = (most_supers + kSupersAtOnce - 1) / kSupersAtOnce;
    parallel_for(blocks * chunks, context.run.threads, [&](std::int64_t i, int) {
      const std::int64_t block = i % blocks;
      const std::int64_t first = (chunks - 1 - i / blocks) * kSupersAtOnce;
      const Regions own = regions(problem, block / problem.q_heads);
      const std::int64_t end = std::min(first + kSupersAtOnce, own.supers());
      if (first < end) choose(problem, inputs, own, block, first, end, means[block], exact, lists[block]);
    });
    std::vector<Plan> parts(static_cast<std::size_t>(blocks));
    parallel_for(blocks, context.run.threads, [&](std::int64_t block, int) {
      parts[block] = rows_of(problem, regions(problem, block / problem.q_heads), block, lists[block]);
    });
    return concatenate_blocks(problem, problem.q_heads, problem.batch, parts);
  }

  /// Keys of super-tiles [first, end): one matrix product per panel of keys.
  void choose(const Problem& problem, const AttentionInputs& inputs, const Regions& own, std::int64_t block,
              std::int64_t first, std::int64_t end, std::span<const float> means, const RowStatistics& exact,
              std::vector<std::vector<std::int32_t>>& lists) const {
    const std::int64_t sequence = block / problem.q_heads;
    const std::int64_t head = block % problem.q_heads;
    const std::int64_t dim = problem.head_dim;
    std::vector<float> least;  // scores that the tiles ask for
    const std::int64_t row_begin =
        (problem.tensor_batch_of(sequence) * problem.q_heads + head) * problem.q_len + problem.q_begin_of(sequence);
    for (std::int64_t t = first * own.step; t < end * own.step; ++t) {
      double sum = 0;
      for (std::int64_t r = 0; r < own.tiles.tile_q; ++r) sum += exact.maximum[row_begin + t * own.tiles.tile_q + r];
      least.push_back(static_cast<float>(sum / static_cast<double>(own.tiles.tile_q) - params_.theta));
    }
    std::vector<float> buffer;
    std::vector<float> scores(static_cast<std::size_t>((end - first) * own.step * kPanelKeys));
    std::vector<std::uint8_t> kept(kPanelKeys);
    for (std::int64_t panel = own.init; panel < own.local_begin(end - 1); panel += kPanelKeys) {
      const std::int64_t keys = std::min(kPanelKeys, own.local_begin(end - 1) - panel);
      std::int64_t super = first;
      while (own.local_begin(super) <= panel) ++super;
      const float* rows = score::key_rows(problem, inputs, sequence, head / problem.group(), panel, keys, keys, buffer);
      score::multiply_transposed(means.data() + super * own.step * dim, (end - super) * own.step, dim, rows, keys, dim,
                                 dim, problem.softmax_scale(), scores.data(), kPanelKeys);
      for (const float* tile = scores.data(); super < end; ++super) {
        const std::int64_t count = std::min(keys, own.local_begin(super) - panel);
        std::fill(kept.begin(), kept.end(), std::uint8_t{0});
        for (std::int64_t t = super * own.step; t < (super + 1) * own.step; ++t, tile += kPanelKeys) {
          const float wanted = least[t - first * own.step];
          // Written so that NaN keeps the key.
          for (std::int64_t j = 0; j < count; ++j) kept[j] |= static_cast<std::uint8_t>(!(tile[j] < wanted));
        }
        for (std::int64_t j = 0; j < count; ++j) {
          if (kept[j] != 0) lists[super].push_back(static_cast<std::int32_t>(panel + j));
        }
      }
    }
  }

  /// Rows of one block: the tiles of a super-tile share one list.
  Plan rows_of(const Problem& problem, const Regions& own, std::int64_t block,
               const std::vector<std::vector<std::int32_t>>& lists) const {
    PlanBuilder builder =
        PlanBuilder::for_block(problem, params_.block, params_.block, problem.q_heads, problem.batch, block);
    for (std::int64_t super = 0; super * own.step < own.tiles.count(); ++super) {
      score::PlanRow shared;  // long stretches as runs, the rest as one list
      if (super < own.supers()) shared.selected_keys(own.tiles, super * own.step, lists[super]);
      const std::int64_t pool = shared.tokens.empty() ? 0 : builder.add_tokens(shared.tokens);
      for (std::int64_t t = super * own.step; t < std::min((super + 1) * own.step, own.tiles.count()); ++t) {
        for (const PlanEntry& entry : shared.entries) {
          if (entry.kind == EntryKind::run) builder.run(entry.begin, entry.count);
          if (entry.kind == EntryKind::gather) builder.gather(pool + entry.begin, entry.count);
        }
        builder.end_row();
      }
    }
    return std::move(builder).finish();
  }

  Params params_;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(anchor_stripe, tessera::AnchorStripe);
