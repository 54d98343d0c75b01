// Any bytes as tokenizer.json: an Error, or a tokenizer whose ids lie in its vocabulary and come back as text.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "model/tokenizer.h"

namespace {

constexpr std::int64_t kVocabulary = 1024;

void use(const tessera::model::Tokenizer& tokenizer) {
  constexpr std::string_view texts[]{
      "The quick  brown\tfox's 12345 <s>\r\n\n  x", "\xE4\xBD\xA0\xE5\xA5\xBD e\xCC\x81 \xF0\x9F\x98\x80 \xFF\xC3(",
      "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"};
  for (const std::string_view text : texts) {
    try {
      const auto ids = tokenizer.encode(text, true);
      for (const std::int32_t id : ids) {
        if (id < 0 || id >= kVocabulary) __builtin_trap();
      }
      tokenizer.decode(ids);
    } catch (const tessera::Error&) {  // NOLINT(bugprone-empty-catch): a text that the vocabulary cannot spell
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    const std::string_view text(reinterpret_cast<const char*>(data), size);
    use(tessera::model::Tokenizer::read(tessera::parse_json(text, "input"), "tokenizer.json", kVocabulary));
  } catch (const tessera::Error&) {  // NOLINT(bugprone-empty-catch): the expected answer to most inputs
  }
  return 0;
}
