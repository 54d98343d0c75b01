// The reference of all methods, written from their declarations.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include "tessera/method.h"

namespace tessera {

namespace {

std::string phases_of(const Phases& phases) {
  std::vector<std::string_view> names;
  if (phases.prefill) names.emplace_back("prefill");
  if (phases.decode) names.emplace_back("decode");
  if (phases.backward) names.emplace_back("backward");
  return fmt::format("{}", fmt::join(names, ", "));
}

std::string values_of(const ParameterInfo& parameter) {
  if (!parameter.choices.empty()) return fmt::format("{}", fmt::join(parameter.choices, ", "));
  if (parameter.minimum.empty() && parameter.maximum.empty()) return parameter.type == "bool" ? "true, false" : "";
  return fmt::format("{} to {}", parameter.minimum, parameter.maximum);
}

std::string domain_of(const Domain& domain) {
  std::string text;
  if (!domain.causal) text += " Bidirectional problems only.";
  if (!domain.bidirectional) text += " Causal problems only.";
  if (!domain.variable_length) text += " One length per batch.";
  return text;
}

}  // namespace

std::string methods_markdown() {
  std::string text =
      "# Methods\n\n"
      "Written by `tessera methods --markdown` from the declarations in `src/methods/`. A method is named as `name`, "
      "`name:key=value,key=value`, or by a JSON file: `{\"method\": name, \"parameters\": {...}}`, or per layer "
      "`{\"layers\": [{\"layers\": \"0-1\", \"method\": name, \"parameters\": {...}}, {\"layers\": \"2-\", \"method\": "
      "name}]}`, "
      "with inclusive ranges that cover every layer once.\n";
  std::string_view family;
  for (const MethodEntry& entry : methods()) {
    if (entry.info.family != family) {
      family = entry.info.family;
      text += fmt::format("\n## Family: {}\n", family);
    }
    text += fmt::format("\n### {}\n\n{}.\n\n", entry.info.name, entry.info.summary);
    if (!entry.info.paper.empty()) text += fmt::format("Source: {}. ", entry.info.paper);
    text += fmt::format("Phases: {}.{}{}\n", phases_of(entry.info.phases), domain_of(entry.info.domain),
                        entry.info.own_cache ? " Keeps keys and values its own way." : "");
    if (entry.info.budget) text += fmt::format("`{}` trades quality for cost.\n", entry.info.budget->name);
    if (!entry.info.has_plan) text += "\nA recurrence: it has no plan, and its state carries over from call to call.\n";
    if (!entry.info.side.empty()) {
      text += "\n| side input | shape | needed | meaning |\n|---|---|---|---|\n";
      for (const SideInputInfo& side : entry.info.side) {
        text += fmt::format("| `{}` | {} | {} | {} |\n", side.name, shape_text(side), side.required ? "yes" : "no",
                            side.description);
      }
    }
    if (entry.parameters.empty()) continue;
    text += "\n| parameter | type | default | values | meaning |\n|---|---|---|---|---|\n";
    for (const ParameterInfo& parameter : entry.parameters) {
      text += fmt::format("| `{}` | {} | {} | {} | {} |\n", parameter.name, parameter.type, parameter.default_value,
                          values_of(parameter), parameter.description);
    }
  }
  return text;
}

}  // namespace tessera
