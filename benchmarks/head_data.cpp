// The head data generator: its speed, and the table of docs/data.md (what each selector recovers on each archetype).
#include <benchmark/benchmark.h>

#include <string>

#include "eval/archetypes.h"
#include "eval/selectors.h"
#include "tessera/eval.h"

namespace tessera {
namespace {

void make_head_data(benchmark::State& state, const std::string& kind) {
  HeadOptions options;
  options.kind = kind;
  options.tokens = state.range(0);
  options.dtype = DType::bf16;
  for (auto _ : state) benchmark::DoNotOptimize(make_heads(options));
}

/// Mean over three seeds, one head each.
void selectors(benchmark::State& state, const std::string& kind) {
  constexpr int seeds = 3;
  for (auto _ : state) {
    for (int seed = 0; seed < seeds; ++seed) {
      HeadOptions options;
      options.kind = kind;
      options.tokens = state.range(0);
      options.q_heads = options.kv_heads = 1;
      options.seed = static_cast<std::uint64_t>(seed);
      const HeadData data = make_heads(options);
      const eval::SelectorReport r = eval::evaluate_selectors(data.problem, data.q(), data.k(), data.v(), 0);
      const auto add = [&](const char* name, double value) { state.counters[name] += value / seeds; };
      add("01_tok95", r.tokens_for_95);
      add("02_tile95", r.tiles_for_95);
      add("03_oracle_tok", r.oracle_tokens);
      add("04_oracle_tile", r.oracle_tiles);
      add("05_window", r.window);
      add("06_vert_slash", r.vertical_slash);
      add("07_pooled", r.pooled);
      add("08_antidiag", r.antidiagonal);
      add("09_random", r.random_tiles);
      add("10_page", r.page_bound);
      add("11_L1", r.antidiagonal_rel_l1);
    }
  }
}

const bool kRegistered = [] {
  for (const eval::Suite& suite : eval::suites()) {
    benchmark::RegisterBenchmark(("make_heads/" + suite.name).c_str(), make_head_data, suite.name)
        ->Arg(32768)
        ->UseRealTime()
        ->Unit(benchmark::kMillisecond);
  }
  for (const eval::Archetype& archetype : eval::archetypes()) {
    benchmark::RegisterBenchmark(("selectors/" + archetype.name).c_str(), selectors, archetype.name)
        ->Arg(16384)
        ->Iterations(1)
        ->Unit(benchmark::kMillisecond);
  }
  return true;
}();

}  // namespace
}  // namespace tessera
