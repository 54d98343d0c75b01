// What the files of the command line share: how a command joins it, and how it prints and fails.
#pragma once

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>
#include <string>

namespace tessera::cli {

/// Adds one command to the application: its options and the callback that runs it. Every file apps/cli/<name>.cpp
/// defines `void add_<name>(CLI::App& app)` in this namespace and nothing else has to be told: the build writes the
/// list of commands from the file names. Code that is no command lies in apps/cli/support/.
using AddCommand = void (*)(CLI::App& app);

/// Subcommand of `parent` whose --help ends with an example. Options of the command are bound to a struct that its
/// callback keeps alive (std::make_shared); the callback reports failure by throwing tessera::Error.
CLI::App* add_command(CLI::App& parent, const std::string& name, const std::string& summary,
                      const std::string& example);

/// Adds --json, bound to `flag`.
void add_json_option(CLI::App& command, bool& flag);

/// The command line that gives these options again, for reports.
std::string command_text(const CLI::App& command);

/// Prints one JSON document on standard output. Keys keep the order in which they were set; NaN and infinities, which
/// JSON lacks, become null.
void print_json(const nlohmann::ordered_json& document);

/// Parses and runs; returns the exit status: 0, or 2 after one line `tessera: <message>` on standard error.
int run_command_line(int argc, char** argv);

}  // namespace tessera::cli
