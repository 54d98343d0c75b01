// `tessera models`: the architectures that `tessera run` can load.
#include <fmt/format.h>

#include <memory>

#include "command.h"
#include "tessera/model.h"

namespace tessera::cli {

namespace {

struct Options {
  bool markdown = false;
  bool json = false;
};

void run_models(const Options& options) {
  if (options.markdown) {
    fmt::print("{}", architectures_markdown());
    return;
  }
  if (options.json) {
    nlohmann::ordered_json list = nlohmann::ordered_json::array();
    for (const ArchitectureInfo& info : architectures()) {
      list.push_back({{"model_type", info.name},
                      {"class", info.class_name},
                      {"models", info.models},
                      {"differences", info.differences}});
    }
    print_json(list);
    return;
  }
  for (const ArchitectureInfo& info : architectures()) fmt::print("{:<14}{}\n", info.name, info.models);
}

}  // namespace

void add_models(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* command =
      add_command(app, "models", "List the model architectures that can be run", "tessera models --json");
  command->add_flag("--markdown", options->markdown, "Print the page of all architectures");
  add_json_option(*command, options->json);
  command->callback([options] { run_models(*options); });
}

}  // namespace tessera::cli
