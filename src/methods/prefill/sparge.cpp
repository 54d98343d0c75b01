// SpargeAttn: Accurate and Training-free Sparse Attention Accelerating Any Model Inference, arXiv:2502.18137.
//
// Tiles of queries and keys are predicted by their means, where means can be trusted: a tile is selective when the mean
// cosine of its tokens is above theta. Scores scale * qmean.kmean over the selective key tiles that a query tile may
// see go through a softmax; the largest are kept as long as their sum stays within cdf (at least one), or the best topk
// * key tiles. Key tiles that are not selective are computed by every query, query tiles that are not selective compute
// everything, and the first key tile is kept as a sink. smooth subtracts the mean key first, which no softmax notices
// but means do. While the plan runs, a key tile whose scores all turn out more than lambda powers of 2 below the
// running maximum of its `skip_rows` query rows is left out of the softmax (RunOptions::online_skip).
//
// Differs from the authors' code: products stay in the precision of the inputs; every tile under a causal mask is
// exempt from the skip, not the last one only; lambda = 0 does not skip tiles that reach the maximum exactly; top-k
// keeps one tile at least. Tiles with a zero or undefined token have an undefined cosine and count as not selective.
// Where no kept tile serves all rows of a query tile, its diagonal is added.
#include <algorithm>
#include <chrono>
#include <limits>
#include <utility>

#include "core/error.h"
#include "core/parallel.h"
#include "methods/registry.h"
#include "score/cumulative_mass.h"
#include "score/plan_rows.h"
#include "score/pooled_tiles.h"
#include "score/row_softmax.h"
#include "score/self_similarity.h"
#include "score/top_k.h"

namespace tessera {
namespace {

enum class Rule : std::uint8_t { cdf, topk };

class Sparge {
 public:
  struct Params {
    double theta = 0.6;
    Rule rule = Rule::cdf;
    double cdf = 0.98;
    double topk = 0.5;
    bool sink = true;
    bool smooth = true;
    bool online_skip = true;
    double lambda = 50;
    std::int64_t skip_rows = 32;
    std::int64_t block_q = 128;
    std::int64_t block_k = 64;
    void visit(ParameterList& v) {
      v("theta", theta, -1, 1, "self-similarity above which a tile is predicted by its mean; 1: none is, all is dense");
      v("rule", rule, {"cdf", "topk"}, "keep by cumulative probability, or a share of the key tiles");
      v("cdf", cdf, 0, 1, "share of the predicted probability that the kept tiles stay within; 1 keeps everything");
      v("topk", topk, 0, 1, "share of all key tiles kept per query tile");
      v("sink", sink, "always keep the first key tile");
      v("smooth", smooth, "predict with keys relative to their mean");
      v("online_skip", online_skip, "leave tiles out that turn out too low while the plan runs");
      v("lambda", lambda, 0, 1e30, "that low: powers of 2 below the running maximum");
      v("skip_rows", skip_rows, 1, 128, "query rows that skip together, a power of 2");
      v("block_q", block_q, 16, 1024, "rows of query tiles");
      v("block_k", block_k, 16, 1024, "keys of key tiles; 16, 32, 64 or 128 with online_skip");
    }
  };
  static MethodInfo info() {
    return {.name = "sparge",
            .family = "prefill",
            .summary = "tiles predicted by their means where tokens are alike, plus a skip by score while running",
            .paper =
                "SpargeAttn: Accurate and Training-free Sparse Attention Accelerating Any Model Inference, "
                "arXiv:2502.18137",
            .phases = {.prefill = true, .decode = false},
            .budget = {{"cdf", 0, 1}}};
  }

  explicit Sparge(Params params) : params_(params) {
    const auto power_of_two = [](std::int64_t x) { return (x & (x - 1)) == 0; };
    require(power_of_two(params_.skip_rows), "sparge: skip_rows={} is not a power of 2", params_.skip_rows);
    require(!params_.online_skip || (power_of_two(params_.block_k) && params_.block_k <= 128),
            "sparge: block_k={} with online_skip; expected 16, 32, 64 or 128", params_.block_k);
  }

  Plan plan(const Problem& problem, const AttentionInputs& inputs, const PlanContext& context) const {
    const int threads = context.run.threads;
    score::PlanRows rows(problem, params_.block_q, params_.block_k, problem.q_heads);
    std::vector<score::SimilarTiles> keys(static_cast<std::size_t>(problem.batch * problem.kv_heads));
    std::vector<score::SimilarTiles> queries(static_cast<std::size_t>(rows.blocks()));
    if (!everything()) {
      const auto kv_blocks = static_cast<std::int64_t>(keys.size());
      parallel_for(kv_blocks + rows.blocks(), threads, [&](std::int64_t i, int) {
        if (i >= kv_blocks) {
          const std::int64_t block = i - kv_blocks;
          queries[block] =
              score::similar_queries(problem, inputs, rows.sequence_of(block), rows.head_of(block), params_.block_q);
          return;
        }
        const std::int64_t s = i / problem.kv_heads;
        const std::int64_t head = i % problem.kv_heads;
        std::vector<float> centre;
        if (params_.smooth) centre = score::mean_key(problem, inputs, s, head);
        keys[i] = score::similar_keys(problem, inputs, s, head, params_.block_k, centre);
      });
    }
    rows.for_each_band(band_tiles, threads, [&](std::int64_t block, std::int64_t first, std::int64_t count, int) {
      const score::QueryTiles tiles = rows.geometry(block);
      const std::int64_t kv = rows.sequence_of(block) * problem.kv_heads + rows.head_of(block) / problem.group();
      std::vector<float> scores(static_cast<std::size_t>(count * tiles.key_tiles()));
      if (!everything()) {
        score::pooled_scores(queries[block].means, keys[kv].means, problem.head_dim, first, count,
                             problem.softmax_scale(), scores);
      }
      std::vector<std::uint8_t> keep;
      for (std::int64_t t = first; t < first + count; ++t) {
        if (everything() || !(queries[block].similarity[t] > params_.theta)) {
          keep.assign(static_cast<std::size_t>(tiles.visible_tiles(t)), 1);
        } else {
          choose(tiles, t, {scores.data() + (t - first) * tiles.key_tiles(), scores.data() + scores.size()},
                 keys[kv].similarity, keep);
        }
        rows.row(block, t).flagged_tiles(tiles, t, keep);
      }
    });
    return std::move(rows).finish(threads);
  }

  RunReport attend(const Problem& problem, const AttentionInputs& inputs, const AttentionOutputs& outputs,
                   const PlanContext& context, Plan* executed) const {
    const auto start = std::chrono::steady_clock::now();
    Plan decided = plan(problem, inputs, context);
    const std::chrono::duration<double, std::milli> planned = std::chrono::steady_clock::now() - start;
    RunOptions options = context.run;
    if (params_.online_skip) {
      // 0 would turn it off: the smallest distance skips what lies below the maximum.
      options.online_skip.distance = std::max(static_cast<float>(params_.lambda), std::numeric_limits<float>::min());
      options.online_skip.rows = params_.skip_rows;
    }
    RunReport report = run(decided, inputs, outputs, options);
    report.plan_ms = planned.count();
    if (executed != nullptr) *executed = std::move(decided);
    return report;
  }

 private:
  static constexpr std::int64_t band_tiles = 64;

  /// Cosines are at most 1, but for rounding.
  bool everything() const { return params_.theta >= 1 || (params_.rule == Rule::cdf && params_.cdf >= 1); }

  /// keep[j] = 1 for the visible key tiles of a selective query tile. `scores` begins with the row of the tile.
  void choose(const score::QueryTiles& tiles, std::int64_t tile, std::span<float> scores,
              std::span<const float> similarity, std::vector<std::uint8_t>& keep) const {
    const std::int64_t visible = tiles.visible_tiles(tile);
    keep.assign(static_cast<std::size_t>(visible), 0);
    const std::span<float> row = scores.first(keep.size());
    bool any = false;
    for (std::int64_t j = 0; j < visible; ++j) {
      const bool selective = similarity[j] > params_.theta;
      any = any || selective;
      if (!selective) {
        keep[j] = 1;
        row[j] = -std::numeric_limits<float>::infinity();
      }
    }
    if (any) {
      score::softmax_row(row);
      const auto share = static_cast<std::int64_t>(params_.topk * static_cast<double>(tiles.key_tiles()));
      const std::vector<std::int32_t> chosen = params_.rule == Rule::cdf
                                                   ? score::select_mass(row, params_.cdf, score::MassRule::topp_excl)
                                                   : score::top_k(row, std::max<std::int64_t>(1, share));
      for (const std::int32_t j : chosen) keep[j] = 1;
    }
    if (params_.sink && visible > 0) keep[0] = 1;
    const std::int64_t common = tiles.common_keys(tile);  // a key tile that begins before it serves every row
    bool serves_all = false;
    for (std::int64_t j = 0; j < visible && j * tiles.tile_k < common; ++j) serves_all = serves_all || keep[j] != 0;
    if (!serves_all) {
      const score::QueryTiles::Range diagonal = tiles.diagonal(tile);
      std::fill(keep.begin() + diagonal.first, keep.begin() + diagonal.end, std::uint8_t{1});
    }
  }

  Params params_;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(sparge, tessera::Sparge);
