// PBS-Attn: Sparser Block-Sparse Attention via Token Permutation, arXiv:2510.21270.
//
// Keys are sorted by importance inside segments of `segment` keys, so that the hot keys of a segment share its first
// tiles and the others can be left out. Importance is the mean probability that the last `block` queries give a key,
// softmax over the keys of all complete segments without a causal mask; an incomplete last segment keeps its order.
// Tiles of earlier segments are scored by softmax of mean query times mean permuted key, and each query tile takes the
// best until they hold `threshold` of the mass. The tile that holds the first key and everything of the query tile's
// own segment are always kept; there the original positions decide what is visible.
//
// Differs from the authors' code: only keys are permuted (their default); a row whose mass falls short of the threshold
// through rounding keeps all tiles instead of none; the mean of a last tile is over the keys it has; a query tile that
// straddles segments counts all of them as its own. The order differs per query head, so keys are gathered per head.
#include <algorithm>
#include <limits>
#include <numeric>

#include "core/error.h"
#include "core/parallel.h"
#include "methods/registry.h"
#include "score/cumulative_mass.h"
#include "score/pooled_tiles.h"
#include "score/query_tiles.h"
#include "score/row_access.h"
#include "score/row_probe.h"
#include "score/row_softmax.h"
#include "score/score_order.h"

namespace tessera {
namespace {

class Pbs {
 public:
  struct Params {
    std::int64_t block = 128;
    std::int64_t segment = 256;
    double threshold = 0.9;
    void visit(ParameterList& v) {
      v("block", block, 16, 1024, "rows of query tiles and keys of key tiles; also the queries probed");
      v("segment", segment, 16, kMostTokens, "keys that are sorted among each other; a multiple of block");
      v("threshold", threshold, 0, 1, "share of the pooled mass of earlier segments to keep; 1 keeps everything");
    }
  };
  static MethodInfo info() {
    return {.name = "pbs",
            .family = "prefill",
            .summary = "keys sorted by importance inside segments, tiles by pooled scores and cumulative mass",
            .paper = "Sparser Block-Sparse Attention via Token Permutation, arXiv:2510.21270",
            .phases = {.prefill = true, .decode = false, .backward = true},
            .domain = {.bidirectional = false, .reason = "its segments lie before or around the query"},
            .budget = {{"threshold", 0, 1}}};
  }

  explicit Pbs(Params params) : params_(params) {
    require(params_.segment % params_.block == 0, "pbs: segment={} is not a multiple of block={}", params_.segment,
            params_.block);
  }

  Plan plan(const Problem& problem, const AttentionInputs& inputs, const PlanContext& context) const {
    std::vector<Plan> parts(static_cast<std::size_t>(problem.batch * problem.q_heads));
    parallel_for(static_cast<std::int64_t>(parts.size()), context.run.threads, [&](std::int64_t block, int) {
      parts[static_cast<std::size_t>(block)] =
          block_plan(problem, inputs, block / problem.q_heads, block % problem.q_heads);
    });
    return concatenate_blocks(problem, problem.q_heads, problem.batch, parts);
  }

 private:
  Plan block_plan(const Problem& problem, const AttentionInputs& inputs, std::int64_t sequence,
                  std::int64_t head) const {
    const score::QueryTiles tiles(problem, sequence, params_.block, params_.block);
    PlanBuilder builder = PlanBuilder::for_block(problem, params_.block, params_.block, problem.q_heads, problem.batch,
                                                 sequence * problem.q_heads + head);
    if (tiles.keys <= params_.segment || tiles.queries == 0) {
      for (std::int64_t t = 0; t < tiles.count(); ++t) {
        add_run(builder, tiles, t, 0, tiles.visible_keys(t));
        builder.end_row();
      }
      return std::move(builder).finish();
    }
    const std::vector<std::int32_t> order = sorted_keys(problem, inputs, sequence, head);
    const auto sink = static_cast<std::int64_t>(std::find(order.begin(), order.end(), 0) - order.begin());
    const std::vector<float> key_means = means_of_keys(problem, inputs, sequence, head / problem.group(), order);
    const std::vector<float> query_means =
        score::pool_queries(problem, inputs, sequence, head, params_.block, score::LastTile::real_rows);
    builder.set_key_order(sequence * problem.q_heads + head, order);

    std::vector<float> scores(static_cast<std::size_t>(tiles.key_tiles()));
    for (std::int64_t t = 0; t < tiles.count(); ++t) {
      // Keys [0, own) lie in segments before all of the tile's own; they are visible to all of its rows.
      const std::int64_t position = std::clamp<std::int64_t>(tiles.first_position(t), 0, tiles.keys);
      const std::int64_t own = position / params_.segment * params_.segment;
      const std::int64_t earlier = own / params_.block;
      if (earlier > 0) {
        score::pooled_scores(query_means, key_means, problem.head_dim, t, 1, problem.softmax_scale(), scores);
        const std::span<float> row(scores.data(), static_cast<std::size_t>(earlier));
        score::softmax_row(row);
        std::vector<std::int32_t> kept = score::select_mass(row, params_.threshold, score::MassRule::topp_incl);
        const auto with_sink = static_cast<std::int32_t>(sink / params_.block);
        const auto at = std::lower_bound(kept.begin(), kept.end(), with_sink);
        if (at == kept.end() || *at != with_sink) kept.insert(at, with_sink);
        add_tiles(builder, kept);
      }
      add_own_segments(builder, tiles, t, own);
      builder.end_row();
    }
    return std::move(builder).finish();
  }

  /// Keys of the sequence, those of each complete segment by descending importance.
  std::vector<std::int32_t> sorted_keys(const Problem& problem, const AttentionInputs& inputs, std::int64_t sequence,
                                        std::int64_t head) const {
    const std::int64_t keys = problem.kv_len_of(sequence);
    const std::int64_t queries = problem.q_len_of(sequence);
    const std::int64_t complete = keys / params_.segment * params_.segment;
    const std::int64_t probed = std::min(params_.block, queries);
    score::LineScores lines;
    score::ProbeBuffers buffers;
    score::probe_rows(problem, inputs, sequence, head, queries - probed, probed, false, lines, buffers,
                      {.limit = complete, .causal = false});
    std::vector<std::int32_t> order(static_cast<std::size_t>(keys));
    std::iota(order.begin(), order.end(), 0);
    for (std::int64_t first = 0; first < complete; first += params_.segment) {
      std::sort(order.begin() + first, order.begin() + first + params_.segment, score::ScoreOrder{lines.columns});
    }
    return order;
  }

  /// Means of the key tiles of the permuted keys: [key tiles][head_dim].
  std::vector<float> means_of_keys(const Problem& problem, const AttentionInputs& inputs, std::int64_t sequence,
                                   std::int64_t kv_head, std::span<const std::int32_t> order) const {
    const auto keys = static_cast<std::int64_t>(order.size());
    const std::int64_t dim = problem.head_dim;
    std::vector<float> means(static_cast<std::size_t>((keys + params_.block - 1) / params_.block * dim), 0.0F);
    std::vector<float> rows;
    for (std::int64_t first = 0; first < keys; first += params_.segment) {
      const std::int64_t count = std::min(params_.segment, keys - first);
      const float* segment = score::key_rows(problem, inputs, sequence, kv_head, first, count, count, rows);
      for (std::int64_t place = first; place < first + count; ++place) {
        const std::int64_t tile = place / params_.block;
        const auto share = 1.0F / static_cast<float>(std::min(params_.block, keys - tile * params_.block));
        const float* row = segment + (order[static_cast<std::size_t>(place)] - first) * dim;
        float* mean = means.data() + tile * dim;
        for (std::int64_t d = 0; d < dim; ++d) mean[d] += share * row[d];
      }
    }
    return means;
  }

  static void add_tiles(PlanBuilder& builder, std::span<const std::int32_t> kept) {
    for (std::size_t i = 0; i < kept.size();) {
      std::size_t end = i + 1;
      while (end < kept.size() && kept[end] == kept[end - 1] + 1) ++end;
      builder.tiles(kept[i], static_cast<std::int64_t>(end - i));
      i = end;
    }
  }

  /// Everything from key `own` to the end of the last segment that some row sees. Positions are shuffled inside
  /// segments, so that no part of the last ones is free of the causal mask.
  void add_own_segments(PlanBuilder& builder, const score::QueryTiles& tiles, std::int64_t tile,
                        std::int64_t own) const {
    const std::int64_t visible = tiles.visible_keys(tile);
    const std::int64_t complete = tiles.keys / params_.segment * params_.segment;
    std::int64_t end = visible;  // in the tail, which keeps its order, keys after the last row need no entry
    if (visible <= complete) end = (visible + params_.segment - 1) / params_.segment * params_.segment;
    if (end > own) add_run(builder, tiles, tile, own, end);
  }

  /// Keys at places [first, end), masked by position where some row does not see all of them.
  static void add_run(PlanBuilder& builder, const score::QueryTiles& tiles, std::int64_t tile, std::int64_t first,
                      std::int64_t end) {
    builder.run(first, end - first, tiles.common_keys(tile) >= end ? EntryMask::none : EntryMask::band);
  }

  Params params_;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(pbs, tessera::Pbs);
