// Options that several commands share: instruction set, threads, kernel.
#pragma once

#include <CLI/CLI.hpp>
#include <string>

#include "tessera/attention.h"

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

}  // namespace tessera::cli
