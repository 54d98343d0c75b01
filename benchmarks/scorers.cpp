// What choosing a plan is made of, at 32,768 tokens and 32 heads, beside dense attention at the same shape: each row's
// counter `of_dense` is its time over that of one dense head times the heads (8 kv heads, head dim 128, bf16), measured
// in the same run. All cores.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <random>
#include <span>
#include <vector>

#include "core/parallel.h"
#include "score/cumulative_mass.h"
#include "score/pooled_tiles.h"
#include "score/row_probe.h"
#include "score/tile_mass.h"
#include "score/top_k.h"
#include "tessera/attention.h"
#include "tessera/eval.h"

namespace {

using tessera::AttentionInputs;
using tessera::HeadData;
using tessera::Problem;

constexpr std::int64_t kTokens = 32768;
constexpr std::int64_t kHeads = 32;
constexpr std::int64_t kKvHeads = 8;
constexpr std::int64_t kTiles = 1024;  // of 32 keys; and as many rows of tiles

/// Four heads of one group; the other heads of the layer cost the same.
const HeadData& group() {
  static const HeadData data = [] {
    tessera::HeadOptions options;
    options.tokens = kTokens;
    options.q_heads = kHeads / kKvHeads;
    options.kv_heads = 1;
    options.dtype = tessera::DType::bf16;
    return tessera::make_heads(options);
  }();
  return data;
}
AttentionInputs inputs() {
  AttentionInputs inputs;
  inputs.q = group().q();
  inputs.k = group().k();
  inputs.v = group().v();
  return inputs;
}
constexpr std::int64_t kGroupHeads = kHeads / kKvHeads;

/// Milliseconds of dense attention over the group.
double dense_milliseconds() {
  static const double milliseconds = [] {
    const Problem& problem = group().problem;
    std::vector<std::uint16_t> o(static_cast<std::size_t>(kGroupHeads * kTokens * 128));
    const tessera::Plan plan = tessera::dense_plan(problem);
    const tessera::AttentionOutputs outputs{
        tessera::mutable_view_of(o.data(), tessera::DType::bf16, {1, kGroupHeads, kTokens, 128}), {}};
    std::array<double, 3> times{};
    for (double& time : times) time = tessera::run(plan, inputs(), outputs).kernel_ms;
    std::sort(times.begin(), times.end());
    return times[1];
  }();
  return milliseconds;
}

/// Times `body` for `heads` of the 32 heads.
template <class Body>
void measure(benchmark::State& state, std::int64_t heads, const Body& body) {
  const double dense = dense_milliseconds() * static_cast<double>(heads) / kGroupHeads;
  double total = 0;
  for (auto _ : state) {
    const auto start = std::chrono::steady_clock::now();
    body();
    total += std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  }
  state.counters["of_dense"] = total / static_cast<double>(state.iterations()) / dense;
}

/// Scores that fall like those of real heads: a few large, a long tail.
const std::vector<float>& tile_scores() {
  static const std::vector<float> scores = [] {
    std::mt19937 random(3);
    std::normal_distribution<float> normal(0, 3);
    std::vector<float> values(static_cast<std::size_t>(kTiles * kTiles));
    for (float& x : values) x = std::exp(normal(random));
    return values;
  }();
  return scores;
}

/// Every row of tiles of 32 heads; row t sees t + 1 tiles.
template <class Select>
void select_rows(benchmark::State& state, const Select& select) {
  measure(state, kHeads, [&] {
    tessera::parallel_for(kHeads * kTiles, 0, [&](std::int64_t row, int) {
      const std::int64_t tile = row % kTiles;
      benchmark::DoNotOptimize(
          select(std::span<const float>(tile_scores().data() + tile * kTiles, static_cast<std::size_t>(tile + 1))));
    });
  });
}

void row_top_p(benchmark::State& state) {
  select_rows(state, [](std::span<const float> scores) {
    return tessera::score::select_mass(scores, 0.9, tessera::score::MassRule::topp_incl);
  });
}
void row_top_k(benchmark::State& state) {
  select_rows(state, [](std::span<const float> scores) { return tessera::score::top_k(scores, 64); });
}

void pooled_products(benchmark::State& state) {
  measure(state, kGroupHeads, [] {
    tessera::parallel_for(kGroupHeads, 0, [](std::int64_t head, int) {
      namespace score = tessera::score;
      const auto queries = score::pool_queries(group().problem, inputs(), 0, head, 64, score::LastTile::real_rows);
      const auto keys = score::pool_keys(group().problem, inputs(), 0, 0, 64, score::LastTile::real_rows);
      std::vector<float> scores(static_cast<std::size_t>(kTokens / 64 * (kTokens / 64)));
      score::pooled_scores(queries, keys, 128, 0, kTokens / 64, 1, scores);
      benchmark::DoNotOptimize(scores.data());
    });
  });
}

void line_probe(benchmark::State& state) {
  measure(state, kGroupHeads, [&] {
    tessera::parallel_for(kGroupHeads, 0, [&](std::int64_t head, int) {
      tessera::score::LineScores lines;
      tessera::score::ProbeBuffers buffers;
      tessera::score::probe_rows(group().problem, inputs(), 0, head, kTokens - state.range(0), state.range(0), true,
                                 lines, buffers);
      benchmark::DoNotOptimize(lines.columns.data());
    });
  });
}

void tile_mass(benchmark::State& state) {
  namespace score = tessera::score;
  const score::TileMassOptions options{.tile_q = 128, .tile_k = 128, .stride = state.range(0)};
  const std::int64_t band = score::tiles_per_band(options);
  const std::int64_t bands = kTokens / 128 / band;
  measure(state, kGroupHeads, [&] {
    tessera::parallel_for(kGroupHeads * bands, 0, [&](std::int64_t i, int) {
      score::TileMassBuffers buffers;
      std::vector<float> mass(static_cast<std::size_t>(band * (kTokens / 128)));
      score::tile_mass(group().problem, inputs(), 0, i % kGroupHeads, options, i / kGroupHeads * band, band, mass,
                       buffers);
      benchmark::DoNotOptimize(mass.data());
    });
  });
}

BENCHMARK(row_top_p)->Unit(benchmark::kMillisecond)->UseRealTime();
BENCHMARK(row_top_k)->Unit(benchmark::kMillisecond)->UseRealTime();
BENCHMARK(pooled_products)->Unit(benchmark::kMillisecond)->UseRealTime();
BENCHMARK(line_probe)->Arg(64)->Arg(128)->Unit(benchmark::kMillisecond)->UseRealTime();
BENCHMARK(tile_mass)->Arg(8)->Arg(16)->Unit(benchmark::kMillisecond)->UseRealTime();

}  // namespace
