#include "tune/threshold_search.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "core/error.h"
#include "core/parallel.h"
#include "score/always_keep.h"
#include "score/cumulative_mass.h"
#include "score/query_tiles.h"
#include "score/tile_mass.h"

namespace tessera::tune {

namespace {

/// body(head, query tiles, tile, exact masses, scores of the method) for all rows of tiles, heads in parallel.
template <class Body>
void for_each_tile_row(const Problem& problem, const AttentionInputs& inputs, const TileScoring& scoring, int threads,
                       const Body& body) {
  check_inputs(problem, inputs);
  require(problem.batch == 1 && !problem.variable_length() && problem.q_len > 0 && problem.q_len <= problem.kv_len,
          "the search for thresholds needs one sequence; got batch {}, {} queries, {} keys", problem.batch,
          problem.q_len, problem.kv_len);
  require(scoring.stride >= 1 && scoring.block % scoring.stride == 0 && scoring.norm > 0,
          "stride is {}, block {}, norm {}; expected a stride that divides block", scoring.stride, scoring.block,
          scoring.norm);
  const score::TileMassOptions exact{
      .tile_q = scoring.block, .tile_k = scoring.block, .stride = 1, .scale = problem.softmax_scale()};
  const score::TileMassOptions antidiagonal{
      .tile_q = scoring.block,
      .tile_k = scoring.block,
      .stride = scoring.stride,
      .scale = problem.softmax_scale() / static_cast<float>(static_cast<double>(scoring.stride) * scoring.norm)};
  const score::QueryTiles tiles(problem, 0, scoring.block, scoring.block);
  const std::int64_t band = score::tiles_per_band(antidiagonal);
  parallel_for(problem.q_heads, threads, [&](std::int64_t head, int) {
    score::TileMassBuffers buffers;
    std::vector<float> masses;
    std::vector<float> scores;
    for (std::int64_t first = 0; first < tiles.count(); first += band) {
      const std::int64_t count = std::min(band, tiles.count() - first);
      masses.resize(static_cast<std::size_t>(count * tiles.key_tiles()));
      scores.resize(masses.size());
      score::tile_mass(problem, inputs, 0, head, exact, first, count, masses, buffers);
      score::tile_mass(problem, inputs, 0, head, antidiagonal, first, count, scores, buffers);
      for (std::int64_t t = 0; t < count; ++t) {
        const auto visible = static_cast<std::size_t>(tiles.visible_tiles(first + t));
        const std::int64_t at = t * tiles.key_tiles();
        body(head, tiles, first + t, std::span<const float>(masses.data() + at, visible),
             std::span<const float>(scores.data() + at, visible));
      }
    }
  });
}

double sum_of(std::span<const float> values) {
  return std::accumulate(values.begin(), values.end(), 0.0);
}

}  // namespace

std::vector<double> profiled_thresholds(const Problem& problem, const AttentionInputs& inputs,
                                        const TileScoring& scoring, double coverage, int threads) {
  std::vector<double> held(static_cast<std::size_t>(problem.q_heads));
  std::vector<double> total(held.size());
  for_each_tile_row(problem, inputs, scoring, threads,
                    [&](std::int64_t head, const score::QueryTiles&, std::int64_t, std::span<const float> masses,
                        std::span<const float> scores) {
                      const std::vector<std::int32_t> needed =
                          score::select_mass(masses, coverage, score::MassRule::topp_incl);
                      float least = std::numeric_limits<float>::infinity();
                      for (const std::int32_t tile : needed) least = std::min(least, scores[tile]);
                      for (const float score : scores) held[head] += score >= least ? static_cast<double>(score) : 0;
                      total[head] += sum_of(scores);
                    });
  for (std::size_t head = 0; head < held.size(); ++head) held[head] = std::min(1.0, held[head] / total[head]);
  return held;
}

ThresholdOutcome outcome_of_thresholds(const Problem& problem, const AttentionInputs& inputs,
                                       const TileScoring& scoring, std::span<const double> thresholds, int threads) {
  const auto size = static_cast<std::size_t>(problem.q_heads) * thresholds.size();
  ThresholdOutcome outcome{std::vector<double>(size), std::vector<double>(size)};
  std::vector<double> rows(static_cast<std::size_t>(problem.q_heads));
  std::vector<double> visible(rows.size());
  // What the method always keeps.
  const score::AlwaysKeep always{.sinks = problem.causal ? 1 : 0, .diagonal = problem.causal};
  for_each_tile_row(problem, inputs, scoring, threads,
                    [&](std::int64_t head, const score::QueryTiles& tiles, std::int64_t tile,
                        std::span<const float> masses, std::span<const float> scores) {
                      std::vector<std::uint8_t> forced;
                      always.force_tiles(tiles, tile, forced);
                      rows[head] += sum_of(masses);
                      visible[head] += static_cast<double>(masses.size());
                      for (std::size_t i = 0; i < thresholds.size(); ++i) {
                        const std::size_t at = static_cast<std::size_t>(head) * thresholds.size() + i;
                        const auto kept = score::select_mass(scores, thresholds[i], score::MassRule::topp_incl, forced);
                        for (const std::int32_t j : kept) outcome.mass[at] += static_cast<double>(masses[j]);
                        outcome.density[at] += static_cast<double>(kept.size());
                      }
                    });
  for (std::size_t at = 0; at < size; ++at) {
    const std::size_t head = at / thresholds.size();
    outcome.mass[at] /= rows[head];
    outcome.density[at] /= visible[head];
  }
  return outcome;
}

std::vector<std::int64_t> lower_thresholds(const std::vector<std::vector<double>>& quality, std::int64_t most_steps,
                                           double least_share) {
  require(!quality.empty() && most_steps >= 0, "{} heads, {} steps; expected one head or more", quality.size(),
          most_steps);
  constexpr double unreachable = -std::numeric_limits<double>::infinity();
  const auto steps = static_cast<std::size_t>(most_steps) + 1;
  std::vector<double> best(steps, unreachable);
  best[0] = 0;
  double untouched = 0;
  std::vector<std::vector<std::uint16_t>> taken;  // [head][m]: j of the maximum
  for (const std::vector<double>& head : quality) {
    require(!head.empty() && head.size() <= 65536, "a head has {} qualities; expected 1 to 65536", head.size());
    untouched += head[0];
    std::vector<double> next(steps, unreachable);
    auto& choice = taken.emplace_back(steps, std::uint16_t{0});
    for (std::size_t m = 0; m < steps; ++m) {
      for (std::size_t j = 0; j < head.size() && j <= m; ++j) {
        const double sum = best[m - j] + head[j];
        if (sum > next[m]) {
          next[m] = sum;
          choice[m] = static_cast<std::uint16_t>(j);
        }
      }
    }
    best = std::move(next);
  }
  std::size_t m = steps - 1;
  while (m > 0 && !(best[m] >= least_share * untouched)) --m;
  std::vector<std::int64_t> lowered(quality.size());
  for (std::size_t head = quality.size(); head-- > 0;) {
    lowered[head] = taken[head][m];
    m -= taken[head][m];
  }
  return lowered;
}

}  // namespace tessera::tune
