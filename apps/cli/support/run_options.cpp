#include "support/run_options.h"

#include <algorithm>
#include <array>
#include <vector>

#include "core/error.h"

namespace tessera::cli {

namespace {

constexpr std::array kKernelKinds{KernelKind::automatic, KernelKind::reference, KernelKind::query_major,
                                  KernelKind::key_major, KernelKind::split_key};

template <class Values>
std::vector<std::string> names_of(const Values& values) {
  std::vector<std::string> names;
  names.reserve(values.size());
  for (const auto value : values) names.emplace_back(name_of(value));
  return names;
}

}  // namespace

void add_run_options(CLI::App& command, RunFlags& flags) {
  command.add_option("--isa", flags.isa,
                     fmt::format("Instruction set of the kernels, of those here: {} (default: the last, or "
                                 "TESSERA_ISA)",
                                 fmt::join(names_of(supported_isas()), ", ")));
  command.add_option("--threads", flags.threads, "Threads (default: all)");
  command.add_option("--kernel", flags.kernel, fmt::format("Kernel: {}", fmt::join(names_of(kKernelKinds), ", ")))
      ->capture_default_str();
}

CacheType kv_dtype_of(const std::string& name) {
  try {
    return cache_type_from_name(name);
  } catch (const Error& error) {
    throw Error(fmt::format("--kv-dtype: {}", error.what()));
  }
}

void add_load_options(CLI::App& command, LoadFlags& flags) {
  command
      .add_option(
          "--weights", flags.weights,
          "Where weights lie: mapped (pages of the file), copied (memory of the process: decoding is faster) or "
          "auto (copied if they take at most half of the memory available)")
      ->capture_default_str();
}

LoadOptions load_options_of(const LoadFlags& flags, int threads) {
  try {
    return {weight_memory_from_name(flags.weights), threads};
  } catch (const Error& error) {
    throw Error(fmt::format("--weights: {}", error.what()));
  }
}

RunOptions run_options_of(const RunFlags& flags) {
  RunOptions options;
  const std::vector<Isa> here = supported_isas();
  if (!flags.isa.empty()) {
    options.isa = isa_from_name(flags.isa);
    require(std::find(here.begin(), here.end(), *options.isa) != here.end(),
            "--isa {} cannot run on this machine; it has: {}", flags.isa, fmt::join(names_of(here), ", "));
  } else {
    options.isa = default_isa();
  }
  const auto kernel = std::find_if(kKernelKinds.begin(), kKernelKinds.end(),
                                   [&](KernelKind kind) { return name_of(kind) == flags.kernel; });
  require(kernel != kKernelKinds.end(), "unknown kernel '{}'; did you mean '{}'?", flags.kernel,
          nearest_name(flags.kernel, names_of(kKernelKinds)));
  options.kernel = *kernel;
  require(flags.threads >= 0 && flags.threads <= 4096, "--threads is {}; expected 0 (all) to 4096", flags.threads);
  options.threads = flags.threads;
  return options;
}

void add_grid_options(CLI::App& command, GridFlags& flags) {
  command.add_option("--grid", flags.grid,
                     "Grid of the tokens: TxHxW (frames, rows, columns), HxW or W (default: a plain sequence)");
  command.add_option("--prefix", flags.prefix, "Text tokens before the grid")->capture_default_str();
  command.add_option("--suffix", flags.suffix, "Text tokens after the grid")->capture_default_str();
}

std::optional<TokenGrid> grid_of(const GridFlags& flags) {
  if (flags.grid.empty()) {
    require(flags.prefix == 0 && flags.suffix == 0, "--prefix and --suffix need --grid");
    return std::nullopt;
  }
  TokenGrid grid = grid_from_text(flags.grid);
  grid.prefix = flags.prefix;
  grid.suffix = flags.suffix;
  return grid;
}

}  // namespace tessera::cli
