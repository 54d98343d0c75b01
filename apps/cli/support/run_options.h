// Options that several commands share: instruction set, threads, kernel; the grid of the tokens.
#pragma once

#include <CLI/CLI.hpp>
#include <optional>
#include <string>

#include "tessera/attention.h"
#include "tessera/model.h"

namespace tessera::cli {

struct RunFlags {
  std::string isa;
  std::string kernel = "automatic";
  int threads = 0;
};

/// Adds --isa, --kernel and --threads, bound to `flags`.
void add_run_options(CLI::App& command, RunFlags& flags);

/// Throws Error for unknown names, an instruction set that this machine lacks and a negative number of threads.
RunOptions run_options_of(const RunFlags& flags);

/// Value of --kv-dtype. Throws Error that names the option and lists the known types.
CacheType kv_dtype_of(const std::string& name);

/// Where a command that runs a model lets its weights lie.
struct LoadFlags {
  std::string weights = "auto";
};

/// Adds --weights, bound to `flags`.
void add_load_options(CLI::App& command, LoadFlags& flags);

/// Throws Error for an unknown name.
LoadOptions load_options_of(const LoadFlags& flags, int threads);

struct GridFlags {
  std::string grid;
  std::int64_t prefix = 0;
  std::int64_t suffix = 0;
};

/// Adds --grid, --prefix and --suffix, bound to `flags`.
void add_grid_options(CLI::App& command, GridFlags& flags);

/// Nothing without --grid. Throws Error for text that is no grid, and for --prefix or --suffix without one.
std::optional<TokenGrid> grid_of(const GridFlags& flags);

}  // namespace tessera::cli
