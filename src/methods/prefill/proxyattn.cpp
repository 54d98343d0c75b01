// ProxyAttn: Guided Sparse Attention via Representative Heads, arXiv:2509.24745.
//
// Query heads are cut into `proxies` groups of neighbours; the mean query and the mean key of a group stand for it.
// Key tiles are ranked by the largest probability that the proxy gives to a pair inside the tile, token by token, so
// that a single hot key is never averaged away. How many tiles a head keeps is its own affair: its true probabilities
// over the last query tile, pooled over key tiles, say which share of the tiles holds gamma of the mass, and every
// query tile keeps that share of the tiles it sees, the first and the diagonal one on top. Heads of a group keep nested
// sets.
//
// The ranking is a by-product of the fused kernel (AttentionOutputs::tile_maximum) over the proxies, with a few columns
// in place of values: what a ranking costs is the scores of `proxies` heads. Proxies of bf16 inputs are bf16, as means
// of such tensors are elsewhere.
//
// Not settled by the paper and chosen here: groups are consecutive heads and pooled by the mean; the budget is probed
// with the last query tile and counted by the rule that keeps the tile that crosses gamma; query_step takes every so
// manieth query of the proxy. gamma = 1 keeps everything.
#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <map>
#include <numeric>
#include <utility>

#include "core/convert.h"
#include "core/error.h"
#include "core/parallel.h"
#include "methods/registry.h"
#include "score/always_keep.h"
#include "score/cumulative_mass.h"
#include "score/plan_rows.h"
#include "score/proxy_heads.h"
#include "score/row_probe.h"
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

  std::int64_t prefill_tile() const { return params_.gamma >= 1 ? 1 : 0; }

  Plan plan(const Problem& problem, const AttentionInputs& inputs, const PlanContext& context) const {
    require(problem.q_heads % params_.proxies == 0, "proxyattn: proxies={} does not divide the {} query heads",
            params_.proxies, problem.q_heads);
    if (params_.gamma >= 1) return dense_plan(problem, params_.block, params_.block);
    const int threads = context.run.threads;
    const std::vector<std::vector<float>> ranking = rank_tiles(problem, inputs, context.run);
    score::PlanRows rows(problem, params_.block, params_.block, problem.q_heads);
    const score::AlwaysKeep always{.sinks = 1, .dense_below = params_.dense_below};
    parallel_for(rows.blocks(), threads, [&](std::int64_t block, int) {
      const score::QueryTiles tiles = rows.geometry(block);
      const std::int64_t proxy = rows.head_of(block) / (problem.q_heads / params_.proxies);
      const std::int64_t first = proxy * tiles.count() * tiles.key_tiles();
      const float* scores = ranking[rows.sequence_of(block)].data() + first;
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
             score::top_k({scores + t * tiles.key_tiles(), forced.size()}, std::max<std::int64_t>(1, count))) {
          forced[static_cast<std::size_t>(j)] = 1;
        }
        rows.row(block, t).flagged_tiles(tiles, t, forced);
      }
    });
    return std::move(rows).finish(threads);
  }

 private:
  /// Largest probability per [proxy][query tile][key tile], for each sequence.
  std::vector<std::vector<float>> rank_tiles(const Problem& problem, const AttentionInputs& inputs,
                                             const RunOptions& options) const {
    const bool pairs = inputs.q.dtype == DType::bf16 && inputs.k.dtype == DType::bf16;
    const score::ProxyHeads proxies(problem, inputs, params_.proxies, options.threads);
    RunOptions own = options;
    own.online_skip = {};
    if (own.kernel != KernelKind::reference) own.kernel = KernelKind::automatic;
    std::vector<std::vector<float>> ranking(static_cast<std::size_t>(problem.batch));
    for (std::int64_t s = 0; s < problem.batch; ++s) {
      const score::QueryTiles tiles(problem, s, params_.block, params_.block);
      ranking[s].resize(static_cast<std::size_t>(params_.proxies * tiles.count() * tiles.key_tiles()));
      if (ranking[s].empty()) continue;
      const DType dtype = pairs ? DType::bf16 : DType::f32;
      const Rows queries = rows_of(proxies.inputs().q, problem.tensor_batch_of(s), problem.q_begin_of(s), tiles.queries,
                                   params_.query_step, dtype, options.threads);
      const Rows keys = rows_of(proxies.inputs().k, problem.tensor_batch_of(s), problem.kv_begin_of(s), tiles.keys, 1,
                                dtype, options.threads);
      Problem sampled;
      sampled.q_heads = sampled.kv_heads = params_.proxies;
      sampled.q_len = queries.tokens;
      sampled.kv_len = keys.tokens;
      sampled.head_dim = problem.head_dim;
      sampled.value_dim = std::min(value_columns, problem.head_dim);
      sampled.scale = problem.softmax_scale();
      AttentionInputs of_proxies;
      of_proxies.q = queries.view(problem.head_dim);
      of_proxies.k = keys.view(problem.head_dim);
      of_proxies.v = of_proxies.k;
      of_proxies.v.shape[3] = sampled.value_dim;
      std::vector<std::uint16_t> unused(static_cast<std::size_t>(params_.proxies * sampled.q_len * sampled.value_dim));
      AttentionOutputs outputs{
          mutable_view_of(unused.data(), DType::bf16, {1, params_.proxies, sampled.q_len, sampled.value_dim}), {}};
      outputs.tile_maximum =
          mutable_view_of(ranking[s].data(), DType::f32, {1, params_.proxies, tiles.count(), tiles.key_tiles()});
      run(visible_plan(sampled, tiles), of_proxies, outputs, own);
    }
    return ranking;
  }

  /// Rows of some heads, contiguous.
  struct Rows {
    DType dtype;
    std::int64_t heads;
    std::int64_t tokens;
    std::vector<std::byte> data;
    TensorView view(std::int64_t dim) const { return view_of(data.data(), dtype, {1, heads, tokens, dim}); }
  };

  /// Every step-th of `count` tokens from `first` on, of one batch entry of float rows.
  static Rows rows_of(const TensorView& from, std::int64_t batch, std::int64_t first, std::int64_t count,
                      std::int64_t step, DType dtype, int threads) {
    Rows rows{dtype, from.heads(), (count + step - 1) / step, {}};
    const std::int64_t row_bytes = from.dim() * static_cast<std::int64_t>(size_of(dtype));
    rows.data.resize(static_cast<std::size_t>(rows.heads * rows.tokens * row_bytes));
    parallel_for(rows.heads * rows.tokens, threads, [&](std::int64_t i, int) {
      const std::byte* row = from.row(batch, i / rows.tokens, first + i % rows.tokens * step);
      from_float(reinterpret_cast<const float*>(row), from.dim(), dtype, rows.data.data() + i * row_bytes);
    });
    return rows;
  }

  /// What the sampled queries of each tile may see. Their positions are no longer neighbours, so that causality is
  /// written as bits: few masks, since all whole tiles have the same.
  Plan visible_plan(Problem sampled, const score::QueryTiles& tiles) const {
    const std::int64_t step = params_.query_step;
    if (step == 1) {
      sampled.causal = tiles.causal;
      sampled.q_offset = tiles.offset;
      return dense_plan(sampled, params_.block, params_.block);
    }
    PlanBuilder builder(sampled, params_.block / step, params_.block, 1, 1);
    std::map<std::array<std::int64_t, 3>, std::int64_t> masks;  // rows, keys of the diagonal, where it begins
    for (std::int64_t t = 0; t < tiles.count(); ++t) {
      const std::int64_t common = tiles.common_keys(t);
      const std::int64_t count = (tiles.rows(t) + step - 1) / step;
      const std::int64_t diagonal =
          tiles.keys_visible_from(tiles.first_position(t) + (count - 1) * step) - common;  // keys that not all rows see
      builder.run(0, common);
      if (diagonal > 0) {
        const auto [known, is_new] = masks.try_emplace({count, diagonal, common - tiles.first_position(t)}, 0);
        if (is_new) {
          const std::int64_t words = (diagonal + 63) / 64;
          std::vector<std::uint64_t> bits(static_cast<std::size_t>(count * words), 0);
          for (std::int64_t r = 0; r < count; ++r) {
            const std::int64_t end = tiles.keys_visible_from(tiles.first_position(t) + r * step) - common;
            for (std::int64_t j = 0; j < end; ++j) bits[r * words + j / 64] |= std::uint64_t{1} << (j % 64);
          }
          known->second = builder.add_mask(bits);
        }
        builder.run(common, diagonal, EntryMask::bitmask, known->second);
      }
      builder.end_row();
    }
    return std::move(builder).finish();
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

  static constexpr std::int64_t value_columns = 16;  ///< the product with values is of no use

  Params params_;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(proxyattn, tessera::ProxyAttn);
