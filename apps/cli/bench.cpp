// `tessera bench`: peaks of the machine, and attention measured against them.
#include <fmt/format.h>

#include <memory>
#include <vector>

#include "command.h"
#include "core/parallel.h"
#include "kernels/peak.h"
#include "support/bench_attention.h"
#include "tessera/attention.h"

namespace tessera::cli {

namespace {

struct PeakOptions {
  bool json = false;
};

void run_bench_peak(const PeakOptions& options) {
  const int threads = thread_count(0);
  nlohmann::ordered_json peaks = nlohmann::ordered_json::array();
  for (const Isa isa : supported_isas()) {
    std::vector<DType> dtypes{DType::f32};
    if (isa == Isa::avx512_bf16) dtypes.push_back(DType::bf16);  // the others compute bf16 in f32
    for (const DType dtype : dtypes) {
      fmt::print(stderr, "measuring {} {} ...\n", name_of(isa), name_of(dtype));
      peaks.push_back({{"isa", name_of(isa)},
                       {"compute", name_of(dtype)},
                       {"gflops_one_thread", kernels::measure_peak_gflops(isa, dtype, 1)},
                       {"gflops", kernels::measure_peak_gflops(isa, dtype, threads)}});
    }
  }
  fmt::print(stderr, "measuring read bandwidth ...\n");
  const double one_thread = kernels::measure_read_bandwidth(1);
  const double all_threads = kernels::measure_read_bandwidth(threads);
  if (options.json) {
    print_json({{"threads", threads},
                {"default_isa", name_of(default_isa())},
                {"peaks", peaks},
                {"read_gbps_one_thread", one_thread},
                {"read_gbps", all_threads}});
    return;
  }
  fmt::print("{:<14}{:<10}{:>16}{:>16}\n", "instructions", "compute", "1 thread", fmt::format("{} threads", threads));
  for (const auto& peak : peaks) {
    fmt::print("{:<14}{:<10}{:>9.1f} GFLOP/s{:>9.1f} GFLOP/s\n", peak["isa"].get<std::string>(),
               peak["compute"].get<std::string>(), peak["gflops_one_thread"].get<double>(),
               peak["gflops"].get<double>());
  }
  fmt::print("{:<24}{:>12.1f} GB/s{:>12.1f} GB/s\n", "memory reads", one_thread, all_threads);
}

void add_bench_peak(CLI::App& bench) {
  auto options = std::make_shared<PeakOptions>();
  CLI::App* command = add_command(bench, "peak", "Peak arithmetic per instruction set and peak memory reads",
                                  "tessera bench peak --json");
  add_json_option(*command, options->json);
  command->callback([options] { run_bench_peak(*options); });
}

}  // namespace

void add_bench(CLI::App& app) {
  CLI::App* bench = add_command(app, "bench", "Measure this machine and attention on it",
                                "tessera bench attention --method window:size=1024 --len 32768 --heads 8 --kv-heads 2 "
                                "--dim 128 --dtype bf16 --causal");
  bench->require_subcommand(1);
  add_bench_attention(*bench);
  add_bench_peak(*bench);
}

}  // namespace tessera::cli
