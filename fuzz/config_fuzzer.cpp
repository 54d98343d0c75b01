// Any bytes as config.json and as tokenizer.json: an Error, or a configuration and a tokenizer that keep their
// promises.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "model/config.h"
#include "model/tokenizer.h"

namespace {

void use(const tessera::ModelConfig& config) {
  const bool consistent = config.q_heads % config.kv_heads == 0 && config.head_dim % 2 == 0 && config.layers > 0 &&
                          config.rope.theta > 0 && config.norm_epsilon > 0;
  if (!consistent) __builtin_trap();
  for (const std::int32_t token : config.eos_tokens) {
    if (token < 0 || token >= config.vocab_size) __builtin_trap();
  }
}

/// What the tokenizer can spell must come back unchanged.
void use(const tessera::model::Tokenizer& tokenizer) {
  for (int byte = 0; byte < 256; ++byte) {
    const auto text = std::string(1, static_cast<char>(byte));
    std::vector<std::int32_t> tokens;
    try {
      tokens = tokenizer.encode(text);
    } catch (const tessera::Error&) {
      continue;  // a byte that the vocabulary lacks
    }
    if (tokens.size() != 1 || tokenizer.decode(tokens) != text) __builtin_trap();
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
  try {
    use(tessera::model::read_config(json, "config.json"));
  } catch (const tessera::Error&) {
  }
  try {
    use(tessera::model::Tokenizer::read(json, "tokenizer.json", 1024));
  } catch (const tessera::Error&) {
  }
  return 0;
}
