// `tessera tune`: searches that write the configuration of a method.
#include <fmt/format.h>

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "command.h"
#include "core/error.h"
#include "io/atomic_file.h"
#include "io/json.h"
#include "support/progress.h"
#include "support/run_options.h"
#include "tessera/model.h"
#include "tune/tuner.h"

namespace tessera::cli {

namespace {

struct Options {
  std::string model;
  std::string text;
  std::string out;
  std::int64_t length = 0;
  std::vector<std::string> parameters;
  LoadFlags load;
  RunFlags run;
  bool json = false;
};

/// key=value pairs as a JSON object of the declared types; what does not read as its type stays a string, which the
/// search refuses by name.
Json parameters_of_pairs(const tune::TunerEntry& tuner, const std::vector<std::string>& pairs) {
  Json parameters = Json::object();
  for (const std::string& pair : pairs) {
    const std::size_t equals = pair.find('=');
    require(equals != std::string::npos && equals > 0, "--param {}: expected key=value", pair);
    const std::string key = pair.substr(0, equals);
    const std::string text = pair.substr(equals + 1);
    require(!parameters.contains(key), "--param {}: '{}' is given twice", pair, key);
    bool literal = false;
    for (const ParameterInfo& info : tuner.parameters) {
      literal = literal || (info.name == key && info.type != "string" && info.type != "choice");
    }
    const Json value = literal ? Json::parse(text, nullptr, false) : Json(text);
    parameters[key] = value.is_number() || value.is_boolean() ? value : Json(text);
  }
  return parameters;
}

void run_tune(const tune::TunerEntry& tuner, const Options& options) {
  const Json parameters = parameters_of_pairs(tuner, options.parameters);
  require(options.out.ends_with(".json"), "--out is '{}'; expected a name that ends with .json, as --method reads",
          options.out);
  const Model model = Model::load(options.model, load_options_of(options.load, options.run.threads));
  watch_interrupt();
  tune::TuningTask task;
  task.model = &model;
  if (!options.text.empty()) {
    task.text = read_text_file(options.text);
    require(!task.text.empty(), "--text {}: the file is empty", options.text);
  }
  require(options.length >= 0, "--length is {}; expected 0 (the search's default) or more", options.length);
  task.length = options.length;
  task.run = run_options_of(options.run);
  task.cancelled = [] { return interrupted(); };
  ProgressLine progress;
  std::string phase;
  task.on_progress = [&](std::string_view name, double done, double total) {
    if (phase != name) {
      progress.finish();
      phase = name;
    }
    progress.show_share(phase.c_str(), done / total);
  };
  // Made before the search: a place that cannot be written is found out at once.
  AtomicFile file(options.out);
  const Json document = tune::tune(tuner.method, task, parameters.dump());
  progress.finish();
  file.write(document.dump(1) + "\n");
  file.commit();
  if (options.json) {
    print_json({{"method", tuner.method}, {"out", options.out}, {"tuned", document["tuned"]}});
  } else {
    fmt::print("{}: use it with --method {}\n", options.out, options.out);
  }
}

/// The parameters of a search for the end of its --help.
std::string parameter_help(const tune::TunerEntry& tuner) {
  std::string text = "Parameters (--param KEY=VALUE):\n";
  for (const ParameterInfo& info : tuner.parameters) {
    const std::string values = info.choices.empty() ? info.type : fmt::format("{}", fmt::join(info.choices, "|"));
    text += fmt::format("  {} ({}, default {}): {}\n", info.name, values,
                        info.default_value.empty() ? "none" : info.default_value, info.description);
  }
  return text;
}

void add_tuner(CLI::App& tune, const tune::TunerEntry& tuner) {
  auto options = std::make_shared<Options>();
  const std::string example = fmt::format("tessera tune {} --model models/tessera-bytes --length 4096 --out {}.json",
                                          tuner.method, tuner.method);
  CLI::App* command = add_command(tune, tuner.method, tuner.summary, example);
  command->footer(fmt::format("{}Source: {}\n\nExample:\n  {}", parameter_help(tuner), tuner.paper, example));
  command->add_option("--model", options->model, "Folder with config.json, *.safetensors and tokenizer.json")
      ->required();
  command->add_option("--out", options->out, "File to write, for --method; its name ends with .json")->required();
  command->add_option("--text", options->text, "File with calibration text (default: generated prompts)");
  command->add_option("--length", options->length, "Tokens of a calibration prompt (default: the search's own)");
  command->add_option("--param", options->parameters, "Parameter of the search, as key=value; may be given again");
  add_load_options(*command, options->load);
  add_run_options(*command, options->run);
  add_json_option(*command, options->json);
  command->callback([&tuner, options] { run_tune(tuner, *options); });
}

}  // namespace

void add_tune(CLI::App& app) {
  CLI::App* tune = add_command(app, "tune", "Search the configuration of a method for a model",
                               "tessera tune duo --model models/tessera-bytes --out duo.json");
  tune->require_subcommand(1);
  for (const tune::TunerEntry& tuner : tune::tuners()) add_tuner(*tune, tuner);
}

}  // namespace tessera::cli
