// FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference, arXiv:2502.20766.
//
// Per head, the last `block` queries are probed densely: column sums a[j], sums d[o] at distance o. The head is query
// aware when the pooled estimate of the probe, softmax of mean query times mean keys, is close to the truth pooled over
// key tiles (Jensen-Shannon distance below tau); then tiles come from the pooled scores of all query tiles, the best of
// the whole head together until they hold gamma of the mass. Otherwise it is a vertical-slash head. Every head keeps
// the best key tiles and tile diagonals of the probe: as many as its lines need for gamma of the probed mass, but at
// least min_budget tokens of each; a query-aware head keeps just that minimum. The first key tile and the diagonal are
// always kept.
//
// The paper asks for the fewest lines that hold gamma of the probed mass. count=lines keeps of them what the authors'
// code keeps: as many tiles as those lines would fill side by side (their number divided by the tile), and a distance
// counts for the tile diagonal that it begins in. That holds gamma where lines lie together: sinks, a local band. Lines
// that stand alone need a tile each, and a distance that is no multiple of the tile needs two diagonals: on the
// generated heads `vertical-slash` and `slash` of 8,192 tokens it holds 0.46 and 0.53 of the mass. count=tiles is the
// paper's criterion on tiles: the best tiles of either kind until they hold gamma, distances shared out between the two
// diagonals that they touch; 0.94 and 0.93 there, for twice the tiles.
//
// Differs from the authors' code: distances are pooled as they are where the length is no multiple of the tile
// (the code pools them shifted by the padding); 0 ln 0 is 0 in the divergence; ties go to the smaller index; with
// queries that do not line up with the key tiles a tile diagonal is two tiles wide; gamma = 1 keeps everything; a call
// whose queries are fewer than a tile probes those it has.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>

#include "core/parallel.h"
#include "methods/registry.h"
#include "score/cumulative_mass.h"
#include "score/plan_rows.h"
#include "score/pooled_tiles.h"
#include "score/row_access.h"
#include "score/row_probe.h"
#include "score/row_softmax.h"
#include "score/top_k.h"

namespace tessera {
namespace {

constexpr float kForced = std::numeric_limits<float>::infinity();

/// Square root of the Jensen-Shannon divergence (natural logarithm) of two distributions.
double jensen_shannon_distance(std::span<const float> p, std::span<const float> q) {
  const auto term = [](double x, double mean) { return x > 0 ? x * std::log(x / mean) : 0.0; };
  double divergence = 0;
  for (std::size_t i = 0; i < p.size(); ++i) {
    const double mean = 0.5 * (static_cast<double>(p[i]) + static_cast<double>(q[i]));
    divergence += 0.5 * term(p[i], mean) + 0.5 * term(q[i], mean);
  }
  return std::sqrt(std::max(0.0, divergence));
}

/// sums[i / width] += values[i].
std::vector<float> pooled(std::span<const float> values, std::int64_t width, std::int64_t count) {
  std::vector<float> sums(static_cast<std::size_t>(count), 0.0F);
  for (std::size_t i = 0; i < values.size(); ++i) {
    const std::size_t to = i / static_cast<std::size_t>(width);
    if (to < sums.size()) sums[to] += values[i];
  }
  return sums;
}

/// sums[b] and sums[b + 1] += the shares of a distance in tile diagonal b and in the next one, over all rows of a tile.
std::vector<float> pooled_diagonals(std::span<const float> offsets, std::int64_t width, std::int64_t count) {
  std::vector<float> sums(static_cast<std::size_t>(count), 0.0F);
  for (std::size_t o = 0; o < offsets.size(); ++o) {
    const std::size_t b = o / static_cast<std::size_t>(width);
    const float beyond =
        offsets[o] * static_cast<float>(o % static_cast<std::size_t>(width)) / static_cast<float>(width);
    if (b < sums.size()) sums[b] += offsets[o] - beyond;
    if (b + 1 < sums.size()) sums[b + 1] += beyond;
  }
  return sums;
}

enum class Count : std::uint8_t { lines, tiles };

class FlexPrefill {
 public:
  struct Params {
    std::int64_t block = 128;
    double gamma = 0.9;
    double tau = 0.1;
    std::int64_t min_budget = 1024;
    std::int64_t max_budget = 0;
    Count count = Count::lines;
    void visit(ParameterList& v) {
      v("block", block, 16, 1024, "rows of query tiles and keys of key tiles; also the queries probed");
      v("gamma", gamma, 0, 1, "share of the mass to keep; 1 keeps everything");
      v("tau", tau, 0, 1, "Jensen-Shannon distance below which a head is query aware; 0: none is, 1: all are");
      v("min_budget", min_budget, 0, kMostTokens, "tokens that the vertical lines, and the slash lines, keep at least");
      v("max_budget", max_budget, 0, kMostTokens, "tokens that each of them keeps at most; 0: no limit");
      v("count", count, {"lines", "tiles"},
        "tiles that the lines with gamma of the mass would fill, as the authors' code counts, or that hold gamma "
        "themselves");
    }
  };
  static MethodInfo info() {
    return {
        .name = "flexprefill",
        .family = "prefill",
        .summary = "per head either pooled query-aware tiles or vertical and slash tiles, counts by cumulative mass",
        .paper =
            "FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference, "
            "arXiv:2502.20766",
        .phases = {.prefill = true, .decode = false},
        .domain = {.bidirectional = false, .reason = "its slash lines are distances before the query"},
        .budget = {{"gamma", 0, 1}}};
  }

  explicit FlexPrefill(Params params) : params_(params) {}

  std::int64_t prefill_tile() const { return params_.gamma >= 1 ? 1 : 0; }

  Plan plan(const Problem& problem, const AttentionInputs& inputs, const PlanContext& context) const {
    score::PlanRows rows(problem, params_.block, params_.block, problem.q_heads);
    std::vector<Scratch> scratch(static_cast<std::size_t>(thread_count(context.run.threads)));
    parallel_for(rows.blocks(), context.run.threads, [&](std::int64_t block, int thread) {
      const score::QueryTiles tiles = rows.geometry(block);
      if (params_.gamma >= 1 || tiles.keys <= dense_keys()) {
        for (std::int64_t t = 0; t < tiles.count(); ++t) rows.row(block, t).everything(tiles, t);
        return;
      }
      Scratch& own = scratch[static_cast<std::size_t>(thread)];
      const Lines lines = probe(problem, inputs, rows, block, own);
      if (lines.query_aware) choose_pooled(problem, inputs, rows, block, own);
      write_rows(tiles, lines, own, block, rows);
    });
    return std::move(rows).finish(context.run.threads);
  }

 private:
  struct Scratch {
    score::LineScores lines;
    score::ProbeBuffers probe;
    std::vector<float> key_means;
    std::vector<float> scores;         ///< [query tiles][key tiles]
    std::vector<std::uint8_t> chosen;  ///< [query tiles][key tiles], by pooled scores
    std::vector<float> descending;
    std::vector<std::uint8_t> keep;
  };
  struct Lines {
    bool query_aware = false;
    std::vector<std::int32_t> columns;    ///< key tiles
    std::vector<std::int32_t> diagonals;  ///< tiles back from the diagonal
  };

  std::int64_t tiles_of(std::int64_t tokens) const { return (tokens + params_.block - 1) / params_.block; }
  /// Tiles that the lines of each kind get at least: the forced one counts.
  std::int64_t least_tiles() const { return std::max<std::int64_t>(1, tiles_of(params_.min_budget)); }
  /// Sequences up to this many keys run dense.
  std::int64_t dense_keys() const { return std::max<std::int64_t>(2, tiles_of(params_.min_budget)) * params_.block; }

  Lines probe(const Problem& problem, const AttentionInputs& inputs, const score::PlanRows& rows, std::int64_t block,
              Scratch& own) const {
    const score::QueryTiles tiles = rows.geometry(block);
    const std::int64_t sequence = rows.sequence_of(block);
    const std::int64_t head = rows.head_of(block);
    const std::int64_t probed = std::min(params_.block, tiles.queries);
    score::probe_rows(problem, inputs, sequence, head, tiles.queries - probed, probed, true, own.lines, own.probe);
    for (float& x : own.lines.columns) x /= static_cast<float>(probed);
    for (float& x : own.lines.offsets) x /= static_cast<float>(probed);

    own.key_means =
        score::pool_keys(problem, inputs, sequence, head / problem.group(), params_.block, score::LastTile::real_rows);
    std::vector<float> columns = pooled(own.lines.columns, params_.block, tiles.key_tiles());
    const bool by_tiles = params_.count == Count::tiles;
    std::vector<float> diagonals = (by_tiles ? pooled_diagonals : pooled)(
        own.lines.offsets, params_.block, tiles_of(tiles.last_position(tiles.count() - 1) + 1));

    Lines lines;
    lines.query_aware =
        jensen_shannon_distance(estimate(problem, inputs, tiles, sequence, head, probed, own), columns) < params_.tau;
    const auto count = [&](std::span<const float> each, std::span<const float> by_tile) {
      if (lines.query_aware) return least_tiles();
      return within_budgets(by_tiles ? tiles_with_mass(by_tile) : count_of(each, own) / params_.block + 1);
    };
    const std::int64_t column_count = count(own.lines.columns, columns);
    const std::int64_t diagonal_count = count(own.lines.offsets, diagonals);
    if (!columns.empty()) columns[0] = kForced;
    if (!diagonals.empty()) diagonals[0] = kForced;
    lines.columns = score::top_k(columns, column_count);
    lines.diagonals = score::top_k(diagonals, diagonal_count);
    return lines;
  }

  /// What the probe would be by mean query and mean keys.
  std::vector<float> estimate(const Problem& problem, const AttentionInputs& inputs, const score::QueryTiles& tiles,
                              std::int64_t sequence, std::int64_t head, std::int64_t probed, const Scratch& own) const {
    std::vector<float> queries(static_cast<std::size_t>(probed * problem.head_dim));
    score::load_queries(problem, inputs, sequence, head, tiles.queries - probed, probed, queries.data());
    std::vector<float> mean(static_cast<std::size_t>(problem.head_dim), 0.0F);
    for (std::size_t i = 0; i < queries.size(); ++i) mean[i % mean.size()] += queries[i] / static_cast<float>(probed);
    std::vector<float> row(static_cast<std::size_t>(tiles.key_tiles()));
    score::pooled_scores(mean, own.key_means, problem.head_dim, 0, 1, problem.softmax_scale(), row);
    const auto visible = static_cast<std::size_t>(tiles.visible_tiles(tiles.count() - 1));
    std::fill(row.begin() + static_cast<std::ptrdiff_t>(visible), row.end(), -kForced);
    score::softmax_row(row);
    return row;
  }

  /// Lines that hold gamma of the mass.
  std::int64_t count_of(std::span<const float> lines, Scratch& own) const {
    own.descending.assign(lines.begin(), lines.end());
    const double total = std::accumulate(lines.begin(), lines.end(), 0.0);
    if (!std::isfinite(total)) return static_cast<std::int64_t>(lines.size());
    std::sort(own.descending.begin(), own.descending.end(), std::greater<>());
    return score::count_by_mass(own.descending, params_.gamma * total, score::MassRule::topp_count);
  }

  /// Tiles that hold gamma of the mass, the first among them.
  std::int64_t tiles_with_mass(std::span<const float> tiles) const {
    std::vector<std::uint8_t> forced(tiles.size(), 0);
    if (!forced.empty()) forced[0] = 1;
    return static_cast<std::int64_t>(
        score::select_mass(tiles, params_.gamma, score::MassRule::topp_incl, forced).size());
  }

  std::int64_t within_budgets(std::int64_t tiles) const {
    if (params_.max_budget > 0) tiles = std::min(tiles, tiles_of(params_.max_budget));
    return std::max(tiles, least_tiles());
  }

  /// The best tiles of the whole head by pooled scores, until they hold gamma of the mass of all its rows.
  void choose_pooled(const Problem& problem, const AttentionInputs& inputs, const score::PlanRows& rows,
                     std::int64_t block, Scratch& own) const {
    const score::QueryTiles tiles = rows.geometry(block);
    const std::int64_t columns = tiles.key_tiles();
    const std::vector<float> query_means = score::pool_queries(
        problem, inputs, rows.sequence_of(block), rows.head_of(block), params_.block, score::LastTile::real_rows);
    own.scores.resize(static_cast<std::size_t>(tiles.count() * columns));
    score::pooled_scores(query_means, own.key_means, problem.head_dim, 0, tiles.count(), problem.softmax_scale(),
                         own.scores);
    for (std::int64_t t = 0; t < tiles.count(); ++t) {
      const std::span<float> row(own.scores.data() + t * columns, static_cast<std::size_t>(columns));
      std::fill(row.begin() + tiles.visible_tiles(t), row.end(), -kForced);
      score::softmax_row(row);
    }
    own.chosen.assign(own.scores.size(), 0);
    for (const std::int32_t i : score::select_mass(own.scores, params_.gamma, score::MassRule::topp_excl)) {
      own.chosen[static_cast<std::size_t>(i)] = 1;
    }
  }

  static void write_rows(const score::QueryTiles& tiles, const Lines& lines, Scratch& own, std::int64_t block,
                         score::PlanRows& rows) {
    for (std::int64_t t = 0; t < tiles.count(); ++t) {
      const std::int64_t visible = tiles.visible_tiles(t);
      own.keep.assign(static_cast<std::size_t>(visible), 0);
      if (lines.query_aware) std::copy_n(own.chosen.begin() + t * tiles.key_tiles(), visible, own.keep.begin());
      for (const std::int32_t column : lines.columns) {
        if (column < visible) own.keep[static_cast<std::size_t>(column)] = 1;
      }
      const score::QueryTiles::Range diagonal = tiles.diagonal(t);
      for (const std::int32_t back : lines.diagonals) {
        const std::int64_t end = std::max<std::int64_t>(0, diagonal.end - back);
        for (std::int64_t j = std::max<std::int64_t>(0, diagonal.first - back); j < end; ++j) {
          own.keep[static_cast<std::size_t>(j)] = 1;
        }
      }
      rows.row(block, t).flagged_tiles(tiles, t, own.keep);
    }
  }

  Params params_;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(flexprefill, tessera::FlexPrefill);
