// The yardstick: selection by the exact probabilities of dense attention, at the cost of dense scores.
//
// unit = block: key tile j of query tile i scores its exact softmax mass, the sum of P over the tile. unit = token: key
// c scores the sum of P[r][c] over the rows r of the query tile; block_q = 1 selects per query. rule = topk keeps the k
// best units per query tile, rule = topp the fewest that hold the share p of the tile's mass (the one that crosses is
// kept). Scores are streamed, never N x N.
#include "methods/registry.h"
#include "score/always_keep.h"
#include "score/cumulative_mass.h"
#include "score/plan_rows.h"
#include "score/row_probe.h"
#include "score/tile_mass.h"
#include "score/top_k.h"

namespace tessera {
namespace {

struct OracleTopK {
  enum class Unit : std::uint8_t { block, token };
  enum class Rule : std::uint8_t { topk, topp };

  struct Params {
    Unit unit = Unit::block;
    Rule rule = Rule::topk;
    std::int64_t k = 16;
    double p = 0.95;
    std::int64_t block_q = 128;
    std::int64_t block_k = 128;
    score::ForcedCount forced = score::ForcedCount::inside;
    score::AlwaysKeep always;
    void visit(ParameterList& v) {
      v("unit", unit, {"block", "token"}, "what is selected per query tile: key tiles or single keys");
      v("rule", rule, {"topk", "topp"}, "a fixed number of units, or the fewest that hold a share of the mass");
      v("k", k, 1, kMostTokens, "topk: units kept per query tile");
      v("p", p, 0, 1, "topp: share of the probability mass to keep; 1 keeps everything");
      v("block_q", block_q, 1, 1024, "rows of query tiles; 1 selects for every query by itself");
      v("block_k", block_k, 8, 1024, "keys of key tiles");
      v("forced", forced, {"inside", "outside"}, "whether always-kept units use up k");
      always.visit(v);
    }
  };
  static MethodInfo info() {
    return {.name = "oracle-topk",
            .family = "prefill",
            .summary = "exact top-k or top-p of blocks or tokens from full scores: the yardstick, not a speed-up",
            .paper = "",
            .phases = {.prefill = true, .decode = true},
            .budget = {{"k", 1, 1 << 20, true}}};
  }

  std::int64_t prefill_tile() const {
    return params.always.last_rows == 0 && params.always.dense_below == 0 ? params.block_q : 0;
  }

  Plan plan(const Problem& problem, const AttentionInputs& inputs, const PlanContext& context) const {
    score::PlanRows rows(problem, params.block_q, params.block_k, problem.q_heads);
    if (params.unit == Unit::block) {
      select_blocks(problem, inputs, context, rows);
    } else {
      select_tokens(problem, inputs, context, rows);
    }
    return std::move(rows).finish(context.run.threads);
  }

  /// The budget; a query tile that would keep nothing keeps its best unit.
  std::vector<std::int32_t> choose(std::span<const float> scores, std::span<const std::uint8_t> forced) const {
    if (params.rule == Rule::topk) return score::top_k(scores, params.k, forced, params.forced);
    return score::select_mass(scores, params.p, score::MassRule::topp_incl, forced);
  }

  void select_blocks(const Problem& problem, const AttentionInputs& inputs, const PlanContext& context,
                     score::PlanRows& rows) const {
    const score::TileMassOptions options{
        .tile_q = params.block_q, .tile_k = params.block_k, .stride = 1, .scale = problem.softmax_scale()};
    struct Scratch {
      score::TileMassBuffers buffers;
      std::vector<float> mass;
      std::vector<std::uint8_t> forced;
    };
    std::vector<Scratch> scratch(static_cast<std::size_t>(thread_count(context.run.threads)));
    const auto select_band = [&](std::int64_t block, std::int64_t first, std::int64_t count, int thread) {
      const score::QueryTiles tiles = rows.geometry(block);
      Scratch& own = scratch[thread];
      own.mass.resize(static_cast<std::size_t>(count * tiles.key_tiles()));
      score::tile_mass(problem, inputs, rows.sequence_of(block), rows.head_of(block), options, first, count, own.mass,
                       own.buffers);
      for (std::int64_t tile = first; tile < first + count; ++tile) {
        if (params.always.dense(tiles, tile)) {
          rows.row(block, tile).everything(tiles, tile);
          continue;
        }
        params.always.force_tiles(tiles, tile, own.forced);
        const std::span<const float> scores(own.mass.data() + (tile - first) * tiles.key_tiles(), own.forced.size());
        rows.row(block, tile).selected_tiles(tiles, tile, choose(scores, own.forced));
      }
    };
    rows.for_each_band(score::tiles_per_band(options), context.run.threads, select_band);
  }

  void select_tokens(const Problem& problem, const AttentionInputs& inputs, const PlanContext& context,
                     score::PlanRows& rows) const {
    struct Scratch {
      score::ProbeBuffers buffers;
      score::LineScores lines;
      std::vector<std::uint8_t> forced;
    };
    std::vector<Scratch> scratch(static_cast<std::size_t>(thread_count(context.run.threads)));
    rows.for_each_band(1, context.run.threads, [&](std::int64_t block, std::int64_t tile, std::int64_t, int thread) {
      const score::QueryTiles tiles = rows.geometry(block);
      Scratch& own = scratch[thread];
      if (params.always.dense(tiles, tile)) {
        rows.row(block, tile).everything(tiles, tile);
        return;
      }
      score::probe_rows(problem, inputs, rows.sequence_of(block), rows.head_of(block), tile * tiles.tile_q,
                        tiles.rows(tile), false, own.lines, own.buffers);
      params.always.force_keys(tiles, tile, own.forced);
      const std::span<const float> scores(own.lines.columns.data(), own.forced.size());
      rows.row(block, tile).selected_keys(tiles, tile, choose(scores, own.forced));
    });
  }

  Params params;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(oracle_topk, tessera::OracleTopK);
