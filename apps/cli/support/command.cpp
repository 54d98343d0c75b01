#include "command.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <exception>
#include <new>
#include <span>
#include <string_view>
#include <vector>

#include "core/error.h"
#include "support/command_list.h"

namespace tessera::cli {

namespace {

std::vector<std::string> names_of_commands(const CLI::App& app) {
  const std::vector<const CLI::App*> known = app.get_subcommands([](const CLI::App*) { return true; });
  std::vector<std::string> names(known.size());
  std::transform(known.begin(), known.end(), names.begin(),
                 [](const CLI::App* command) { return command->get_name(); });
  return names;
}

/// Follows the leading words that name commands; throws for a word that should name one and does not. CLI11 would only
/// say that a subcommand is required.
void check_command_names(CLI::App& app, std::span<char* const> words) {
  CLI::App* command = &app;
  for (const std::string_view word : words) {
    const std::vector<std::string> known = names_of_commands(*command);
    if (known.empty() || word.starts_with('-')) return;
    require(std::find(known.begin(), known.end(), word) != known.end(), "unknown command '{}'; did you mean '{}'?",
            word, nearest_name(word, known));
    command = command->get_subcommand(std::string(word));
  }
}

/// One line for a parse error; unknown options get the nearest known one.
std::string message_of(const CLI::App& app, const CLI::ParseError& error) {
  const CLI::App* command = &app;
  std::string words = "tessera";
  while (!command->get_subcommands().empty()) {
    command = command->get_subcommands().front();
    words += " " + command->get_name();
  }
  std::vector<std::string> known;
  for (const CLI::Option* option : command->get_options()) {
    for (const std::string& name : option->get_lnames()) known.push_back("--" + name);
  }
  for (const std::string& word : app.remaining(true)) {
    if (!word.starts_with("-")) continue;
    const std::string name = word.substr(0, word.find('='));
    return fmt::format("unknown option '{}'; did you mean '{}'? (see '{} --help')", name, nearest_name(name, known),
                       words);
  }
  std::string text = error.what();
  std::replace(text.begin(), text.end(), '\n', ' ');
  return fmt::format("{} (see '{} --help')", text, words);
}

int fail_with(std::string_view message) {
  fmt::print(stderr, "tessera: {}\n", message);
  return 2;
}

}  // namespace

CLI::App* add_command(CLI::App& parent, const std::string& name, const std::string& summary,
                      const std::string& example) {
  CLI::App* command = parent.add_subcommand(name, summary);
  command->footer("Example:\n  " + example);
  return command;
}

std::string command_text(const CLI::App& command) {
  const auto quoted = [](const std::string& word) {
    const bool plain =
        word.find_first_not_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-+=:,./@%") ==
        std::string::npos;
    if (plain && !word.empty()) return word;
    std::string text(1, '\'');
    for (const char c : word) text.append(c == '\'' ? "'\\''" : std::string_view(&c, 1));
    text.push_back('\'');
    return text;
  };
  std::string text = "tessera " + command.get_name();
  for (const CLI::Option* option : command.get_options()) {
    if (option->count() == 0) continue;
    text += fmt::format(" --{}", option->get_lnames().front());
    if (option->get_items_expected_max() == 0) continue;
    for (const std::string& word : option->results()) text += fmt::format(" {}", quoted(word));
  }
  return text;
}

void add_json_option(CLI::App& command, bool& flag) {
  command.add_flag("--json", flag, "Print one JSON document on standard output");
}

void print_json(const nlohmann::ordered_json& document) {
  fmt::print("{}\n", document.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace));
}

int run_command_line(int argc, char** argv) {
  CLI::App app("Efficient attention by plan: sparse, hybrid and linear attention on long sequences.", "tessera");
  app.footer("Example:\n  tessera methods\nEvery command has --help with an example.");
  app.set_version_flag("--version", std::string(TESSERA_VERSION));
  app.require_subcommand(1);
  try {
    for (const AddCommand add : commands()) add(app);
    check_command_names(app, {argv + 1, argv + argc});
    app.parse(argc, argv);
    if (std::fflush(stdout) != 0) fail("standard output: write failed");
    return 0;
  } catch (const CLI::Success& request) {  // --help and --version
    return app.exit(request);
  } catch (const CLI::ParseError& error) {
    return fail_with(message_of(app, error));
  } catch (const std::bad_alloc&) {
    return fail_with("out of memory");
  } catch (const std::exception& error) {
    return fail_with(error.what());
  }
}

}  // namespace tessera::cli
