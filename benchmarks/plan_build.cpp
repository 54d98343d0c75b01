// Building plans for 131,072 tokens and 32 heads at 5% density: time of one core without scoring, and memory.
// The choice itself (which tiles, which tokens) is made beforehand, as a scorer would hand it over.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

#include "tessera/plan.h"

namespace {

using tessera::EntryMask;
using tessera::Plan;
using tessera::PlanBuilder;
using tessera::Problem;

constexpr std::int64_t kTile = 128;
constexpr double kDensity = 0.05;

Problem long_problem() {
  Problem problem;
  problem.q_heads = 32;
  problem.kv_heads = 8;
  problem.q_len = problem.kv_len = 131072;
  problem.head_dim = problem.value_dim = 128;
  problem.causal = true;
  return problem;
}

std::int64_t kept_of(std::int64_t available) {
  return std::max<std::int64_t>(1, static_cast<std::int64_t>(kDensity * static_cast<double>(available)));
}

/// Ascending random choices out of [0, available) for every (head, query tile), the last one always among them.
std::vector<std::vector<std::int32_t>> choices(std::int64_t lists, std::int64_t unit) {
  std::mt19937 random(7);
  std::vector<std::vector<std::int32_t>> result;
  for (std::int64_t list = 0; list < lists; ++list) {
    const std::int64_t available = (list % (131072 / kTile) + 1) * kTile / unit;
    std::vector<std::int32_t> chosen;
    const std::int64_t kept = kept_of(available);
    for (std::int64_t i = 0; i + 1 < kept; ++i) {  // one out of each of `kept` equal stretches
      const std::int64_t begin = i * available / kept;
      const std::int64_t size = (i + 1) * available / kept - begin;
      chosen.push_back(static_cast<std::int32_t>(begin + static_cast<std::int64_t>(random()) % size));
    }
    chosen.push_back(static_cast<std::int32_t>(available - 1));
    result.push_back(std::move(chosen));
  }
  return result;
}

/// Tiles chosen per head and query tile; neighbours joined, the diagonal tile causal.
Plan build_tiles(const Problem& problem, const std::vector<std::vector<std::int32_t>>& chosen) {
  PlanBuilder builder(problem, kTile, kTile, problem.q_heads, 1);
  std::size_t entries = 0;
  for (const auto& row : chosen) entries += row.size();
  builder.reserve(entries);
  for (const auto& row : chosen) {
    for (std::size_t i = 0; i + 1 < row.size();) {
      std::size_t last = i + 1;
      while (last + 1 < row.size() && row[last] == row[last - 1] + 1) ++last;
      builder.tiles(row[i], static_cast<std::int64_t>(last - i));
      i = last;
    }
    builder.tiles(row.back(), 1, EntryMask::band);
    builder.end_row();
  }
  return std::move(builder).finish();
}

/// Tokens chosen per GQA group and query tile, the query tile itself causal.
Plan build_gathers(const Problem& problem, const std::vector<std::vector<std::int32_t>>& chosen) {
  PlanBuilder builder(problem, kTile, kTile, problem.kv_heads, 1);
  std::size_t tokens = 0;
  for (const auto& row : chosen) tokens += row.size();
  builder.reserve(2 * chosen.size(), tokens);
  const std::int64_t tiles = problem.q_len / kTile;
  for (std::size_t r = 0; r < chosen.size(); ++r) {
    const std::int64_t query_tile = static_cast<std::int64_t>(r) % tiles;
    const auto& row = chosen[r];
    const auto past = std::lower_bound(row.begin(), row.end(), query_tile * kTile);
    const std::int64_t list = builder.add_tokens({row.begin(), past});
    builder.gather(list, past - row.begin());
    builder.tiles(query_tile, 1, EntryMask::band);
    builder.end_row();
  }
  return std::move(builder).finish();
}

void report(benchmark::State& state, const Plan& plan) {
  const auto numbers = tessera::statistics(plan);
  state.counters["density"] = numbers.density;
  state.counters["entries"] = static_cast<double>(plan.entries.size());
  state.counters["MiB"] = static_cast<double>(plan.memory_bytes()) / (1 << 20);
}

template <class Build>
void run_build(benchmark::State& state, std::int64_t lists, std::int64_t unit, const Build& build) {
  const Problem problem = long_problem();
  const auto chosen = choices(lists, unit);
  for (auto _ : state) {
    const Plan plan = build(problem, chosen);
    benchmark::DoNotOptimize(plan.entries.data());
  }
  report(state, build(problem, chosen));
}

void build_tile_plan(benchmark::State& state) {
  run_build(state, 32 * 1024, kTile, build_tiles);
}
void build_gather_plan(benchmark::State& state) {
  run_build(state, 8 * 1024, 1, build_gathers);
}
void build_gather_plan_per_head(benchmark::State& state) {
  run_build(state, 32 * 1024, 1, [](Problem problem, const auto& chosen) {
    problem.kv_heads = problem.q_heads;
    return build_gathers(problem, chosen);
  });
}

template <class Action>
void run_on_tiles(benchmark::State& state, const Action& action) {
  const Plan plan = build_tiles(long_problem(), choices(32 * 1024, kTile));
  for (auto _ : state) action(plan);
  report(state, plan);
}

void validate_tile_plan(benchmark::State& state) {
  run_on_tiles(state, [](const Plan& plan) { tessera::validate(plan); });
}
void statistics_of_tile_plan(benchmark::State& state) {
  run_on_tiles(state, [](const Plan& plan) { benchmark::DoNotOptimize(tessera::statistics(plan).planned_pairs); });
}
void transpose_tile_plan(benchmark::State& state) {
  run_on_tiles(state, [](const Plan& plan) { benchmark::DoNotOptimize(tessera::transpose(plan).rows.data()); });
}
void complement_of_tile_plan(benchmark::State& state) {
  run_on_tiles(state, [](const Plan& plan) { benchmark::DoNotOptimize(tessera::complement(plan).entries.data()); });
}

BENCHMARK(build_tile_plan)->Unit(benchmark::kMillisecond);
BENCHMARK(build_gather_plan)->Unit(benchmark::kMillisecond);
BENCHMARK(build_gather_plan_per_head)->Unit(benchmark::kMillisecond);
BENCHMARK(validate_tile_plan)->Unit(benchmark::kMillisecond);
BENCHMARK(statistics_of_tile_plan)->Unit(benchmark::kMillisecond);
BENCHMARK(transpose_tile_plan)->Unit(benchmark::kMillisecond);
BENCHMARK(complement_of_tile_plan)->Unit(benchmark::kMillisecond);

}  // namespace
