// The page docs/models.md.
#include "core/error.h"
#include "tessera/model.h"

namespace tessera {

namespace {

struct ScalingText {
  RopeScaling scaling;
  std::string_view text;
};
constexpr ScalingText kScalings[] = {
    {RopeScaling::none, "as trained"},
    {RopeScaling::linear, "positions divided by `factor`"},
    {RopeScaling::dynamic, "a larger base once a sequence is longer than `max_position_embeddings` (dynamic NTK)"},
    {RopeScaling::yarn,
     "YaRN (arXiv:2309.00071), with `attention_factor`, `mscale`, `mscale_all_dim`, `beta_fast`, "
     "`beta_slow`, `truncate`"},
    {RopeScaling::llama3, "Llama 3.1: long waves slowed down, short ones kept"},
    {RopeScaling::longrope,
     "LongRoPE (arXiv:2402.13753): a factor per frequency, by the length of the sequence; also "
     "called `su`"},
};

}  // namespace

std::string architectures_markdown() {
  std::string text =
      "# Models\n\nWritten by `tessera models --markdown`. How to run one: [run-your-model.md](run-your-model.md).\n\n"
      "| `model_type` | class | models | beside Llama |\n|---|---|---|---|\n";
  for (const ArchitectureInfo& info : architectures()) {
    text += fmt::format("| `{}` | {} | {} | {} |\n", info.name, info.class_name, info.models, info.differences);
  }
  text += "\nRotary scalings, for all of them, under `rope_scaling` or `rope_parameters`:\n\n| type | |\n|---|---|\n";
  for (const auto& [scaling, description] : kScalings) {
    text += fmt::format("| `{}` | {} |\n", name_of(scaling), description);
  }
  return text;
}

}  // namespace tessera
