// The tables of docs/run-your-model.md.
#include "core/error.h"
#include "tessera/model.h"

namespace tessera {

std::string architectures_markdown() {
  std::string text = "| model_type | class | models | beside Llama |\n|---|---|---|---|\n";
  for (const ArchitectureInfo& info : architectures()) {
    text += fmt::format("| `{}` | {} | {} | {} |\n", info.name, info.class_name, info.models, info.differences);
  }
  text += "\nRotary scalings, for all of them:";
  for (const RopeScaling scaling : {RopeScaling::none, RopeScaling::linear, RopeScaling::dynamic, RopeScaling::yarn,
                                    RopeScaling::llama3, RopeScaling::longrope}) {
    text += fmt::format("{} `{}`", scaling == RopeScaling::none ? "" : ",", name_of(scaling));
  }
  return text + ".\n";
}

}  // namespace tessera
