// Any bytes as config.json: an Error, or a configuration that keeps its promises.
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

#include "model/config.h"
#include "model/rope.h"

namespace {

void use(const tessera::ModelConfig& config) {
  const bool consistent = config.q_heads % config.kv_heads == 0 && config.head_dim % 2 == 0 && config.layers > 0 &&
                          config.rope.theta > 0 && config.norm_epsilon > 0;
  if (!consistent) __builtin_trap();
  tessera::validate(config, "fuzzer");  // throws nothing for what read_config() gave out
  for (const tessera::RopeConfig* rope : {&config.rope, &config.local_rope}) {
    for (const std::int64_t length : {std::int64_t{1}, config.max_positions}) {
      const auto frequencies = tessera::model::Rope(*rope, config.head_dim).frequencies(length);
      if (std::ssize(frequencies) * 2 > config.head_dim) __builtin_trap();
    }
  }
  for (const std::int32_t token : config.eos_tokens) {
    if (token < 0 || token >= config.vocab_size) __builtin_trap();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  tessera::Json json;
  try {
    json = tessera::parse_json(text, "input");
  } catch (const tessera::Error&) {
    return 0;
  }
  std::optional<tessera::ModelConfig> config;
  try {
    config = tessera::model::read_config(json, "config.json");
  } catch (const tessera::Error&) {
  }
  if (config) use(*config);
  return 0;
}
