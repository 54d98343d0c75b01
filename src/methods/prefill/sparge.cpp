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
#include <numeric>
#include <type_traits>
#include <utility>

#include "core/error.h"
#include "core/parallel.h"
#include "methods/head_values.h"
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
    Configuration heads;
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
      v("heads", heads, "JSON [[{theta, cdf, lambda} per query head] per layer]; replaces those three, rule=cdf only");
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

  explicit Sparge(Params params)
      : params_(std::move(params)),
        heads_("sparge", "heads", params_.heads, {{"theta", -1, 1}, {"cdf", 0, 1}, {"lambda", 0, 1e30}}) {
    require(heads_.empty() || params_.rule == Rule::cdf, "sparge: heads holds values of rule=cdf; rule is topk");
    const auto power_of_two = [](std::int64_t x) { return (x & (x - 1)) == 0; };
    require(power_of_two(params_.skip_rows), "sparge: skip_rows={} is not a power of 2", params_.skip_rows);
    require(!params_.online_skip || (power_of_two(params_.block_k) && params_.block_k <= 128),
            "sparge: block_k={} with online_skip; expected 16, 32, 64 or 128", params_.block_k);
  }

  /// The mean key and the number of kept tiles are those of all keys.
  std::int64_t prefill_tile() const {
    return params_.smooth || params_.rule == Rule::topk ? 0 : std::lcm(params_.block_q, params_.block_k);
  }

  Plan plan(const Problem& problem, const AttentionInputs& inputs, const PlanContext& context) const {
    const int threads = context.run.threads;
    const std::vector<double> thetas = heads_.of_layer(theta_field, params_.theta, problem, context);
    const std::vector<double> cdfs = heads_.of_layer(cdf_field, params_.cdf, problem, context);
    const auto everything = [&](std::int64_t head) {  // cosines are at most 1, but for rounding
      return thetas[head] >= 1 || (params_.rule == Rule::cdf && cdfs[head] >= 1);
    };
    bool all = true;
    for (std::int64_t head = 0; head < problem.q_heads; ++head) all = all && everything(head);
    score::PlanRows rows(problem, params_.block_q, params_.block_k, problem.q_heads);
    std::vector<score::SimilarTiles> keys(static_cast<std::size_t>(problem.batch * problem.kv_heads));
    std::vector<score::SimilarTiles> queries(static_cast<std::size_t>(rows.blocks()));
    if (!all) {
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
      const std::int64_t head = rows.head_of(block);
      const std::int64_t kv = rows.sequence_of(block) * problem.kv_heads + head / problem.group();
      std::vector<float> scores(static_cast<std::size_t>(count * tiles.key_tiles()));
      if (!everything(head)) {
        score::pooled_scores(queries[block].means, keys[kv].means, problem.head_dim, first, count,
                             problem.softmax_scale(), scores);
      }
      std::vector<std::uint8_t> keep;
      for (std::int64_t t = first; t < first + count; ++t) {
        if (everything(head) || !(queries[block].similarity[t] > thetas[head])) {
          keep.assign(static_cast<std::size_t>(tiles.visible_tiles(t)), 1);
        } else {
          choose(tiles, t, {scores.data() + (t - first) * tiles.key_tiles(), scores.data() + scores.size()},
                 keys[kv].similarity, thetas[head], cdfs[head], keep);
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
    RunReport report = run_plan(decided, inputs, outputs, context);
    report.plan_ms = planned.count();
    if (executed != nullptr) *executed = std::move(decided);
    return report;
  }

  void check_model(std::int64_t layers, std::int64_t q_heads, std::int64_t /*kv_heads*/) const {
    heads_.check_model(layers, q_heads);
  }

 private:
  static constexpr std::int64_t band_tiles = 64;
  static constexpr std::size_t theta_field = 0;
  static constexpr std::size_t cdf_field = 1;
  static constexpr std::size_t lambda_field = 2;

  RunReport run_plan(const Plan& plan, const AttentionInputs& inputs, const AttentionOutputs& outputs,
                     const PlanContext& context) const {
    if (!params_.online_skip) return run(plan, inputs, outputs, context.run);
    const std::vector<double> lambdas = heads_.of_layer(lambda_field, params_.lambda, plan.problem, context);
    const auto skip_below = [&](double lambda) {
      RunOptions options = context.run;
      // 0 would turn it off: the smallest distance skips what lies below the maximum.
      options.online_skip.distance = std::max(static_cast<float>(lambda), std::numeric_limits<float>::min());
      options.online_skip.rows = params_.skip_rows;
      return options;
    };
    // A run has one distance. Heads with their own run on their own; where the call wants more than outputs, the
    // largest distance serves all, which skips least.
    const auto most = std::max_element(lambdas.begin(), lambdas.end());
    const bool one = std::all_of(lambdas.begin(), lambdas.end(), [&](double x) { return x == *most; });
    if (one || !plain_call(inputs, outputs)) return run(plan, inputs, outputs, skip_below(*most));
    RunReport report;
    for (std::int64_t head = 0; head < plan.problem.q_heads; ++head) {
      const RunReport own = run_head(plan, head, inputs, outputs, skip_below(lambdas[head]));
      report.kernel = own.kernel;
      report.isa = own.isa;
      report.threads = own.threads;
      report.workspace_bytes = std::max(report.workspace_bytes, own.workspace_bytes);
      report.kernel_ms += own.kernel_ms;
      report.skipped_pairs += own.skipped_pairs;
    }
    return report;
  }

  /// Nothing in the call that differs from head to head, beside the tensors.
  static bool plain_call(const AttentionInputs& inputs, const AttentionOutputs& outputs) {
    return !inputs.modifiers.changes_scores() && inputs.modifiers.sink_logits.empty() &&
           outputs.scores.data == nullptr && outputs.row_maximum.empty() && outputs.tile_maximum.data == nullptr;
  }

  /// One query head of the plan.
  static RunReport run_head(const Plan& plan, std::int64_t head, const AttentionInputs& inputs,
                            const AttentionOutputs& outputs, const RunOptions& options) {
    const Problem& problem = plan.problem;
    Problem own_problem = problem;
    own_problem.q_heads = own_problem.kv_heads = 1;
    own_problem.scale = problem.softmax_scale();
    PlanBuilder builder(own_problem, plan.tile_q, plan.tile_k, 1, problem.batch);
    for (std::int64_t s = 0; s < problem.batch; ++s) {
      const std::int64_t block = plan.block_of(s, head);
      for (std::int64_t r = plan.row_begin[block]; r < plan.row_begin[block + 1]; ++r) {
        for (const PlanEntry& entry : plan.row(r)) {
          if (entry.kind == EntryKind::tile) {
            builder.tiles(entry.begin, entry.count, entry.mask, entry.mask_index);
          } else {
            builder.run(entry.begin, entry.count, entry.mask, entry.mask_index);
          }
        }
        builder.end_row();
      }
    }
    const auto slice = [](auto view, std::int64_t at) {
      using Byte =
          std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(view.data)>>, const std::byte, std::byte>;
      view.data = static_cast<Byte*>(view.data) + at * view.strides[1] * static_cast<std::int64_t>(size_of(view.dtype));
      view.shape[1] = 1;
      return view;
    };
    AttentionInputs own_inputs = inputs;
    own_inputs.q = slice(inputs.q, head);
    own_inputs.k = slice(inputs.k, head / problem.group());
    own_inputs.v = slice(inputs.v, head / problem.group());
    const std::int64_t sequences = problem.variable_length() ? 1 : problem.batch;
    std::vector<float> lse(static_cast<std::size_t>(outputs.lse.empty() ? 0 : sequences * problem.q_len));
    AttentionOutputs own_outputs;
    own_outputs.o = slice(outputs.o, head);
    own_outputs.lse = lse;
    const RunReport report = run(std::move(builder).finish(), own_inputs, own_outputs, options);
    for (std::int64_t s = 0; s < sequences && !lse.empty(); ++s) {
      std::copy_n(lse.begin() + s * problem.q_len, problem.q_len,
                  outputs.lse.begin() + (s * problem.q_heads + head) * problem.q_len);
    }
    return report;
  }

  /// keep[j] = 1 for the visible key tiles of a selective query tile. `scores` begins with the row of the tile.
  void choose(const score::QueryTiles& tiles, std::int64_t tile, std::span<float> scores,
              std::span<const float> similarity, double theta, double cdf, std::vector<std::uint8_t>& keep) const {
    const std::int64_t visible = tiles.visible_tiles(tile);
    keep.assign(static_cast<std::size_t>(visible), 0);
    const std::span<float> row = scores.first(keep.size());
    bool any = false;
    for (std::int64_t j = 0; j < visible; ++j) {
      const bool selective = similarity[j] > theta;
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
                                                   ? score::select_mass(row, cdf, score::MassRule::topp_excl)
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
  HeadValues heads_;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(sparge, tessera::Sparge);
