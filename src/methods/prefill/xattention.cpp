// XAttention: Block Sparse Attention with Antidiagonal Scoring, arXiv:2503.16428.
//
// Scores key tile j for query tile i by sums along the antidiagonals of stride x stride patches: S consecutive keys
// and, in reverse order, S consecutive queries are joined into vectors of S * D; X = s / (S * norm) * Q'K'^T with
// causality by groups; row softmax; W[i][j] = sum of the patch probabilities inside the tile. Per query tile, tiles are
// added in descending W to the forced first and diagonal tile until they hold tau of the row's W.
//
// A single hot key is one of the S terms of the antidiagonals that cross it, so that X sees its logit divided by S:
// clusters and lines a few tokens wide are found, keys that stand alone are not. With the defaults the generated heads
// `blocks` keep 0.95 of the mass at 8,192 tokens, `slash` 0.97, `vertical-slash` 0.8 (stride 4: 0.8; stride 1, whose W
// is the exact mass: 0.92).
//
// Differs from the authors' code: keys past the end are masked instead of scored as zero; ties go to the earlier tile;
// the forced tiles are a set (in the first query tile they are one tile); patches of queries are counted from the
// first query of the call, so with chunked prefill whose offset is not a multiple of the tile two diagonal tiles are
// kept; the code's `keep_sink` row flag is not reproduced, the forced first tile is what it was meant to be.
#include "core/error.h"
#include "methods/head_values.h"
#include "methods/registry.h"
#include "score/always_keep.h"
#include "score/cumulative_mass.h"
#include "score/plan_rows.h"
#include "score/tile_mass.h"

namespace tessera {
namespace {

class XAttention {
 public:
  struct Params {
    std::int64_t stride = 16;
    double tau = 0.9;
    std::int64_t block = 128;
    double norm = 1;
    std::int64_t dense_below = 0;
    Configuration thresholds;
    void visit(ParameterList& v) {
      v("stride", stride, 1, 64, "antidiagonal stride S; divides block; larger is cheaper and coarser");
      v("tau", tau, 0, 1, "share of the score mass to keep per query tile; 1 keeps everything");
      v("block", block, 16, 1024, "rows of query tiles and keys of key tiles");
      v("norm", norm, 1e-3, 1e3, "divisor of the patch scores");
      v("dense_below", dense_below, 0, kMostTokens, "sequences with fewer keys run dense");
      v("thresholds", thresholds, "JSON [[tau per query head] per layer]; replaces tau");
    }
  };
  static MethodInfo info() {
    return {.name = "xattention",
            .family = "prefill",
            .summary = "tiles by antidiagonal scores and cumulative mass",
            .paper = "XAttention: Block Sparse Attention with Antidiagonal Scoring, arXiv:2503.16428",
            .phases = {.prefill = true, .decode = false},
            .budget = {{"tau", 0, 1}}};
  }

  explicit XAttention(Params params)
      : params_(std::move(params)), thresholds_("xattention", "thresholds", params_.thresholds, {{"", 0, 1}}) {
    require(params_.block % params_.stride == 0, "xattention: stride={} does not divide block={}", params_.stride,
            params_.block);
  }

  std::int64_t prefill_tile() const { return params_.dense_below == 0 ? params_.block : 0; }

  Plan plan(const Problem& problem, const AttentionInputs& inputs, const PlanContext& context) const {
    const std::vector<double> shares = thresholds_.of_layer(0, params_.tau, problem, context);
    const score::TileMassOptions options{
        .tile_q = params_.block,
        .tile_k = params_.block,
        .stride = params_.stride,
        .scale = problem.softmax_scale() / static_cast<float>(static_cast<double>(params_.stride) * params_.norm)};
    score::AlwaysKeep always{
        .sinks = problem.causal ? 1 : 0, .diagonal = problem.causal, .dense_below = params_.dense_below};
    score::PlanRows rows(problem, params_.block, params_.block, problem.q_heads);
    struct Scratch {
      score::TileMassBuffers buffers;
      std::vector<float> mass;
      std::vector<std::uint8_t> forced;
    };
    std::vector<Scratch> scratch(static_cast<std::size_t>(thread_count(context.run.threads)));

    const auto select_band = [&](std::int64_t block, std::int64_t first, std::int64_t count, int thread) {
      const score::QueryTiles tiles = rows.geometry(block);
      Scratch& own = scratch[thread];
      const bool dense = tiles.keys < params_.dense_below;
      if (!dense) {
        own.mass.resize(static_cast<std::size_t>(count * tiles.key_tiles()));
        score::tile_mass(problem, inputs, rows.sequence_of(block), rows.head_of(block), options, first, count, own.mass,
                         own.buffers);
      }
      for (std::int64_t t = 0; t < count; ++t) {
        score::PlanRow& row = rows.row(block, first + t);
        if (dense) {
          row.everything(tiles, first + t);
          continue;
        }
        always.force_tiles(tiles, first + t, own.forced);
        const std::span<const float> scores(own.mass.data() + t * tiles.key_tiles(), own.forced.size());
        row.selected_tiles(
            tiles, first + t,
            score::select_mass(scores, shares[rows.head_of(block)], score::MassRule::topp_incl, own.forced));
      }
    };
    rows.for_each_band(score::tiles_per_band(options), context.run.threads, select_band);
    return std::move(rows).finish(context.run.threads);
  }

  void check_model(std::int64_t layers, std::int64_t q_heads, std::int64_t /*kv_heads*/) const {
    thresholds_.check_model(layers, q_heads);
  }

 private:
  Params params_;
  HeadValues thresholds_;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(xattention, tessera::XAttention);
