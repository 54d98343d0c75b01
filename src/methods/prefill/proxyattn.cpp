// ProxyAttn: Guided Sparse Attention via Representative Heads, arXiv:2509.24745.
//
// Query heads are cut into `proxies` groups of neighbours; the mean query and the mean key of a group stand for it.
// Key tiles are ranked by the largest probability that the proxy gives to a pair inside the tile, token by token, so
// that a single hot key is never averaged away. How many tiles a head keeps is its own affair: its true probabilities
// over the last query tile, pooled over key tiles, say which share of the tiles holds gamma of the mass, and every
// query tile keeps that share of the tiles it sees, the first and the diagonal one on top. Heads of a group keep nested
// sets.
//
// Not settled by the paper and chosen here: groups are consecutive heads and pooled by the mean; the budget is probed
// with the last query tile and counted by the rule that keeps the tile that crosses gamma; query_step takes every so
// manieth query of the proxy. gamma = 1 keeps everything.
#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

#include "core/error.h"
#include "core/parallel.h"
#include "methods/registry.h"
#include "score/always_keep.h"
#include "score/cumulative_mass.h"
#include "score/plan_rows.h"
#include "score/proxy_heads.h"
#include "score/row_probe.h"
#include "score/tile_mass.h"
#include "score/top_k.h"

namespace tessera {
namespace {

class ProxyAttn {
 public:
  struct Params {
    std::int64_t proxies = 1;
    double gamma = 0.9;
    std::int64_t block = 128;
    std::int64_t query_step = 1;
    std::int64_t dense_below = 0;
    void visit(ParameterList& v) {
      v("proxies", proxies, 1, 1024, "groups of query heads that share one ranking; divides the heads");
      v("gamma", gamma, 0, 1, "share of the probed mass that sets a head's number of tiles; 1 keeps everything");
      v("block", block, 16, 1024, "rows of query tiles and keys of key tiles; also the queries probed");
      v("query_step", query_step, 1, 1024, "take every query_step-th query of a proxy; divides block");
      v("dense_below", dense_below, 0, kMostTokens, "sequences with fewer keys run dense");
    }
  };
  static MethodInfo info() {
    return {.name = "proxyattn",
            .family = "prefill",
            .summary = "tiles ranked by the largest probability of a mean head, counted per head by its last queries",
            .paper = "ProxyAttn: Guided Sparse Attention via Representative Heads, arXiv:2509.24745",
            .phases = {.prefill = true, .decode = false},
            .budget = {{"gamma", 0, 1}}};
  }

  explicit ProxyAttn(Params params) : params_(params) {
    require(params_.block % params_.query_step == 0, "proxyattn: query_step={} does not divide block={}",
            params_.query_step, params_.block);
  }

  Plan plan(const Problem& problem, const AttentionInputs& inputs, const PlanContext& context) const {
    require(problem.q_heads % params_.proxies == 0, "proxyattn: proxies={} does not divide the {} query heads",
            params_.proxies, problem.q_heads);
    if (params_.gamma >= 1) return dense_plan(problem, params_.block, params_.block);
    const int threads = context.run.threads;
    const std::vector<std::vector<float>> ranking = rank_tiles(problem, inputs, threads);
    score::PlanRows rows(problem, params_.block, params_.block, problem.q_heads);
    const score::AlwaysKeep always{.sinks = 1, .dense_below = params_.dense_below};
    parallel_for(rows.blocks(), threads, [&](std::int64_t block, int) {
      const score::QueryTiles tiles = rows.geometry(block);
      const std::int64_t proxy = rows.head_of(block) / (problem.q_heads / params_.proxies);
      const std::vector<float>& scores = ranking[rows.sequence_of(block) * params_.proxies + proxy];
      const double share = share_of(problem, inputs, rows, block);
      std::vector<std::uint8_t> forced;
      for (std::int64_t t = 0; t < tiles.count(); ++t) {
        if (always.dense(tiles, t)) {
          rows.row(block, t).everything(tiles, t);
          continue;
        }
        always.force_tiles(tiles, t, forced);
        const auto count = static_cast<std::int64_t>(std::ceil(share * static_cast<double>(forced.size())));
        for (const std::int32_t j :
             score::top_k({scores.data() + t * tiles.key_tiles(), forced.size()}, std::max<std::int64_t>(1, count))) {
          forced[static_cast<std::size_t>(j)] = 1;
        }
        rows.row(block, t).flagged_tiles(tiles, t, forced);
      }
    });
    return std::move(rows).finish(threads);
  }

 private:
  /// Largest probability per (query tile, key tile), for each (sequence, proxy).
  std::vector<std::vector<float>> rank_tiles(const Problem& problem, const AttentionInputs& inputs, int threads) const {
    const score::ProxyHeads proxies(problem, inputs, params_.proxies, threads);
    const score::TileMassOptions options{.tile_q = params_.block,
                                         .tile_k = params_.block,
                                         .scale = problem.softmax_scale(),
                                         .statistic = score::TileStatistic::maximum,
                                         .query_step = params_.query_step};
    const score::PlanRows rows(proxies.problem(), params_.block, params_.block, params_.proxies);
    std::vector<std::vector<float>> ranking(static_cast<std::size_t>(rows.blocks()));
    for (std::int64_t b = 0; b < rows.blocks(); ++b) {
      const score::QueryTiles tiles = rows.geometry(b);
      ranking[b].resize(static_cast<std::size_t>(tiles.count() * tiles.key_tiles()));
    }
    std::vector<score::TileMassBuffers> buffers(static_cast<std::size_t>(thread_count(threads)));
    rows.for_each_band(score::tiles_per_band(options), threads,
                       [&](std::int64_t b, std::int64_t first, std::int64_t count, int thread) {
                         const std::int64_t columns = rows.geometry(b).key_tiles();
                         const std::span<float> out(ranking[b].data() + first * columns,
                                                    static_cast<std::size_t>(count * columns));
                         score::tile_mass(proxies.problem(), proxies.inputs(), rows.sequence_of(b), rows.head_of(b),
                                          options, first, count, out, buffers[static_cast<std::size_t>(thread)]);
                       });
    return ranking;
  }

  /// Share of the key tiles that hold gamma of what the last queries of the head see.
  double share_of(const Problem& problem, const AttentionInputs& inputs, const score::PlanRows& rows,
                  std::int64_t block) const {
    const score::QueryTiles tiles = rows.geometry(block);
    if (tiles.keys == 0 || tiles.queries == 0) return 1;
    score::LineScores lines;
    score::ProbeBuffers buffers;
    const std::int64_t probed = std::min(params_.block, tiles.queries);
    score::probe_rows(problem, inputs, rows.sequence_of(block), rows.head_of(block), tiles.queries - probed, probed,
                      false, lines, buffers);
    std::vector<float> mass(static_cast<std::size_t>(tiles.visible_tiles(tiles.count() - 1)), 0.0F);
    for (std::size_t t = 0; t < mass.size(); ++t) {
      const auto first = static_cast<std::int64_t>(t) * params_.block;
      for (std::int64_t j = first; j < std::min(first + params_.block, tiles.keys); ++j) mass[t] += lines.columns[j];
    }
    const double total = std::accumulate(mass.begin(), mass.end(), 0.0);
    if (!std::isfinite(total) || mass.empty()) return 1;
    std::sort(mass.begin(), mass.end(), std::greater<>());
    return static_cast<double>(score::count_by_mass(mass, params_.gamma * total, score::MassRule::topp_incl)) /
           static_cast<double>(mass.size());
  }

  Params params_;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(proxyattn, tessera::ProxyAttn);
