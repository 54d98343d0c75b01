// `tessera bench attention`: one attention call, sparse and dense in turn, in one run.
#pragma once

#include <CLI/CLI.hpp>

namespace tessera::cli {

/// Adds the subcommand `attention` to `tessera bench`.
void add_bench_attention(CLI::App& bench);

}  // namespace tessera::cli
