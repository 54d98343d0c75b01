// MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention, arXiv:2407.02490.
//
// Every (layer, query head) has one of three patterns with two sizes, from the offline search's configuration file or
// the defaults (vertical-slash, 1000, 6096):
//   vertical-slash(v, sl): P = softmax of the last L query rows; the v keys with the largest column sums (the first 30
//     forced) and the sl distances with the largest diagonal sums (the first 100 forced); per tile of 64 queries the
//     distances become merged runs of keys, the columns outside them single keys;
//   A-shape(n_init, n_local): sinks plus window;
//   block-sparse(k): 64 x 64 tiles by mean(Q) . mean(K), the best k per query tile.
//
// Differs from the authors' code: ties go to the smaller index (a budget below the forced count keeps the nearest
// distances, not an arbitrary subset); runs stop at the last visible key; chunked prefill probes the last rows of the
// chunk against all keys.
#include <algorithm>

#include "core/error.h"
#include "methods/head_patterns.h"
#include "methods/registry.h"
#include "score/a_shape.h"
#include "score/pooled_tiles.h"
#include "score/row_probe.h"
#include "score/top_k.h"
#include "score/vertical_slash.h"

namespace tessera {
namespace {

constexpr std::int64_t kTile = 64;
constexpr std::int64_t kForcedColumns = 30;
constexpr std::int64_t kLeastColumns = 30;
constexpr std::int64_t kForcedOffsets = 100;
constexpr std::int64_t kLeastOffsets = 50;

class MInference {
 public:
  struct Params {
    HeadPattern::Kind pattern = HeadPattern::Kind::vertical_and_slash;
    std::int64_t v = 1000;
    std::int64_t sl = 6096;
    std::int64_t n_init = 1024;
    std::int64_t n_local = 4096;
    std::int64_t k = 100;
    std::int64_t last_q = 64;
    std::int64_t dense_layers = 0;
    Configuration config;
    void visit(ParameterList& list) {
      list("pattern", pattern, {"vertical_and_slash", "stream_llm", "block_sparse"},
           "pattern of heads without an entry in the configuration");
      list("v", v, 0, kMostTokens, "vertical-slash: columns kept, at least 30");
      list("sl", sl, 0, kMostTokens, "vertical-slash: distances kept, at least 50");
      list("n_init", n_init, 0, kMostTokens, "stream_llm (A-shape): first keys that every query sees");
      list("n_local", n_local, 1, kMostTokens, "stream_llm (A-shape): nearest keys that a query sees");
      list("k", k, 1, kMostTokens, "block_sparse: key tiles of 64 kept per query tile of 64");
      list("last_q", last_q, 1, 1024, "vertical-slash: query rows of the probe");
      list("dense_layers", dense_layers, 0, 65536, "first layers that run dense");
      list("config", config, "JSON: per layer {head: [pattern, size, size, score]}, as MInference's search writes");
    }
  };
  static MethodInfo info() {
    return {.name = "minference",
            .family = "prefill",
            .summary = "vertical-slash, A-shape or block-sparse per head, lines probed from the last queries",
            .paper =
                "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention, "
                "arXiv:2407.02490",
            .phases = {.prefill = true, .decode = false},
            .domain = {.bidirectional = false, .reason = "its patterns are distances before the query"},
            .budget = {{"sl", 50, 1 << 20, true}}};
  }

  explicit MInference(Params params) : params_(std::move(params)) {
    if (!params_.config.empty()) patterns_ = read_head_patterns(params_.config);
  }

  std::int64_t prefill_tile() const {
    if (!patterns_.empty() || params_.pattern == HeadPattern::Kind::vertical_and_slash) return 0;
    return params_.pattern == HeadPattern::Kind::stream_llm ? 1 : kTile;
  }

  Plan plan(const Problem& problem, const AttentionInputs& inputs, const PlanContext& context) const {
    if (context.layer < params_.dense_layers) return dense_plan(problem);
    score::PlanRows rows(problem, kTile, kTile, problem.q_heads);
    std::vector<Head> heads(static_cast<std::size_t>(rows.blocks()));
    for (std::int64_t b = 0; b < rows.blocks(); ++b) {
      heads[b].pattern = pattern_of(context.layer, rows.head_of(b));
      heads[b].band =
          heads[b].pattern.kind == HeadPattern::Kind::stream_llm ? rows.add_band(shape_of(heads[b]).band(true)) : 0;
    }
    const int threads = context.run.threads;
    std::vector<Scratch> scratch(static_cast<std::size_t>(thread_count(threads)));
    parallel_for(rows.blocks(), threads, [&](std::int64_t b, int thread) {
      estimate(problem, inputs, rows.sequence_of(b), rows.head_of(b), heads[b], scratch[thread]);
    });
    constexpr std::int64_t tiles_together = 32;
    rows.for_each_band(tiles_together, threads,
                       [&](std::int64_t b, std::int64_t first, std::int64_t count, int thread) {
                         const score::QueryTiles tiles = rows.geometry(b);
                         if (heads[b].pattern.kind == HeadPattern::Kind::block_sparse) {
                           add_blocks(problem, tiles, heads[b], b, first, count, rows, scratch[thread]);
                           return;
                         }
                         for (std::int64_t t = first; t < first + count; ++t) {
                           if (heads[b].pattern.kind == HeadPattern::Kind::stream_llm) {
                             shape_of(heads[b]).add(tiles, t, heads[b].band, rows.row(b, t));
                           } else {
                             score::add_vertical_slash(tiles, t, heads[b].lines, rows.row(b, t));
                           }
                         }
                       });
    return std::move(rows).finish(threads);
  }

 private:
  /// What the first phase finds out about a (sequence, query head).
  struct Head {
    HeadPattern pattern;
    std::int64_t band = 0;           ///< A-shape
    score::Lines lines;              ///< vertical-slash
    std::vector<float> query_means;  ///< block-sparse: [query tiles][head_dim]
    std::vector<float> key_means;    ///< block-sparse: [key tiles][head_dim]
  };
  struct Scratch {
    score::LineScores lines;
    score::ProbeBuffers probe;
    std::vector<float> scores;
    std::vector<std::uint8_t> forced;
  };

  static score::AShape shape_of(const Head& head) { return {head.pattern.first, head.pattern.second}; }

  HeadPattern pattern_of(std::int64_t layer, std::int64_t head) const {
    if (layer >= 0 && layer < static_cast<std::int64_t>(patterns_.size())) {
      const auto found = patterns_[layer].find(head);
      if (found != patterns_[layer].end()) return found->second;
    }
    const bool a_shape = params_.pattern == HeadPattern::Kind::stream_llm;
    return {params_.pattern, a_shape ? params_.n_init : params_.v, a_shape ? params_.n_local : params_.sl};
  }

  void estimate(const Problem& problem, const AttentionInputs& inputs, std::int64_t sequence, std::int64_t q_head,
                Head& head, Scratch& own) const {
    if (head.pattern.kind == HeadPattern::Kind::vertical_and_slash) {
      const std::int64_t queries = problem.q_len_of(sequence);
      const std::int64_t probed = std::min(params_.last_q, queries);
      score::probe_rows(problem, inputs, sequence, q_head, queries - probed, probed, true, own.lines, own.probe);
      head.lines.columns =
          score::best_lines(own.lines.columns, std::max(head.pattern.first, kLeastColumns), kForcedColumns);
      head.lines.offsets =
          score::best_lines(own.lines.offsets, std::max(head.pattern.second, kLeastOffsets), kForcedOffsets);
      std::reverse(head.lines.offsets.begin(), head.lines.offsets.end());
    } else if (head.pattern.kind == HeadPattern::Kind::block_sparse) {
      const auto padded = score::LastTile::padded_rows;
      head.query_means = score::pool_queries(problem, inputs, sequence, q_head, kTile, padded);
      head.key_means = score::pool_keys(problem, inputs, sequence, q_head / problem.group(), kTile, padded);
    }
  }

  void add_blocks(const Problem& problem, const score::QueryTiles& tiles, const Head& head, std::int64_t block,
                  std::int64_t first, std::int64_t count, score::PlanRows& rows, Scratch& own) const {
    own.scores.resize(static_cast<std::size_t>(count * tiles.key_tiles()));
    score::pooled_scores(head.query_means, head.key_means, problem.head_dim, first, count, 1, own.scores);
    for (std::int64_t t = first; t < first + count; ++t) {
      const std::span<const float> scores(own.scores.data() + (t - first) * tiles.key_tiles(),
                                          static_cast<std::size_t>(tiles.visible_tiles(t)));
      std::vector<std::int32_t> kept = score::top_k(scores, params_.k);
      // Tiles that line up leave no row empty; where they do not, the first rows may see none of the kept tiles.
      const std::int64_t diagonal = tiles.diagonal(t).first;
      if (!kept.empty() && kept.front() > diagonal) kept.insert(kept.begin(), static_cast<std::int32_t>(diagonal));
      rows.row(block, t).selected_tiles(tiles, t, kept);
    }
  }

  Params params_;
  HeadPatterns patterns_;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(minference, tessera::MInference);
