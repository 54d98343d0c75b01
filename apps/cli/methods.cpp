// `tessera methods`: the registry.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <memory>
#include <string>
#include <vector>

#include "command.h"
#include "tessera/method.h"

namespace tessera::cli {

namespace {

struct Options {
  std::string name;
  bool markdown = false;
  bool json = false;
};

std::vector<std::string> names_of(const Phases& phases) {
  std::vector<std::string> names;
  if (phases.prefill) names.emplace_back("prefill");
  if (phases.decode) names.emplace_back("decode");
  if (phases.backward) names.emplace_back("backward");
  return names;
}

nlohmann::ordered_json to_json(const ParameterInfo& parameter) {
  nlohmann::ordered_json json{{"name", parameter.name}, {"type", parameter.type}, {"default", parameter.default_value}};
  if (!parameter.minimum.empty()) json["minimum"] = parameter.minimum;
  if (!parameter.maximum.empty()) json["maximum"] = parameter.maximum;
  if (!parameter.choices.empty()) json["choices"] = parameter.choices;
  json["description"] = parameter.description;
  return json;
}

nlohmann::ordered_json to_json(const SideInputInfo& side) {
  return {{"name", side.name},       {"shape", shape_text(side)}, {"required", side.required},
          {"minimum", side.minimum}, {"maximum", side.maximum},   {"description", side.description}};
}

nlohmann::ordered_json to_json(const MethodEntry& entry) {
  nlohmann::ordered_json side = nlohmann::ordered_json::array();
  for (const SideInputInfo& input : entry.info.side) side.push_back(to_json(input));
  nlohmann::ordered_json parameters = nlohmann::ordered_json::array();
  for (const ParameterInfo& parameter : entry.parameters) parameters.push_back(to_json(parameter));
  return {{"name", entry.info.name},   {"family", entry.info.family},           {"summary", entry.info.summary},
          {"paper", entry.info.paper}, {"phases", names_of(entry.info.phases)}, {"parameters", parameters},
          {"side_inputs", side},       {"has_plan", entry.info.has_plan},       {"own_cache", entry.info.own_cache}};
}

std::string range_of(const ParameterInfo& parameter) {
  if (!parameter.choices.empty()) return fmt::format("{}", fmt::join(parameter.choices, " | "));
  if (parameter.minimum.empty() && parameter.maximum.empty()) return parameter.type;
  if (parameter.maximum.empty()) return fmt::format("{}, at least {}", parameter.type, parameter.minimum);
  if (parameter.minimum.empty()) return fmt::format("{}, at most {}", parameter.type, parameter.maximum);
  return fmt::format("{}, {} to {}", parameter.type, parameter.minimum, parameter.maximum);
}

void print_method(const MethodEntry& entry) {
  fmt::print("{} ({}; {}{})\n  {}\n", entry.info.name, entry.info.family, fmt::join(names_of(entry.info.phases), ", "),
             entry.info.own_cache ? "; own cache" : "", entry.info.summary);
  if (!entry.info.paper.empty()) fmt::print("  {}\n", entry.info.paper);
  for (const SideInputInfo& side : entry.info.side) {
    fmt::print("  side input {} {}{}\n      {}\n", side.name, shape_text(side), side.required ? "" : " (optional)",
               side.description);
  }
  for (const ParameterInfo& parameter : entry.parameters) {
    fmt::print("  {}={} ({})\n      {}\n", parameter.name, parameter.default_value, range_of(parameter),
               parameter.description);
  }
}

void run_methods(const Options& options) {
  if (options.markdown) {
    fmt::print("{}", methods_markdown());
    return;
  }
  if (!options.name.empty()) {
    const MethodEntry& entry = find_method(options.name);
    if (options.json) {
      print_json(to_json(entry));
    } else {
      print_method(entry);
    }
    return;
  }
  if (options.json) {
    nlohmann::ordered_json list = nlohmann::ordered_json::array();
    for (const MethodEntry& entry : methods()) list.push_back(to_json(entry));
    print_json(list);
    return;
  }
  for (const MethodEntry& entry : methods()) {
    fmt::print("{:<16}{:<12}{:<24}{}\n", entry.info.name, entry.info.family,
               fmt::format("{}{}", fmt::join(names_of(entry.info.phases), ","), entry.info.own_cache ? ",cache" : ""),
               entry.info.summary);
  }
}

}  // namespace

void add_methods(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* command = add_command(app, "methods", "List the attention methods and their parameters",
                                  "tessera methods streaming --json");
  CLI::Option* name = command->add_option("NAME", options->name, "One method, with its parameters");
  command->add_flag("--markdown", options->markdown, "Print the reference page of all methods")->excludes(name);
  add_json_option(*command, options->json);
  command->callback([options] { run_methods(*options); });
}

}  // namespace tessera::cli
