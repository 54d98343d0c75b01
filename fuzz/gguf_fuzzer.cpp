// Any bytes as a GGUF file: an Error, or metadata that can be asked for, tensors whose every block can be widened, and
// perhaps a tokenizer.
#include <cstddef>
#include <cstdint>
#include <span>

#include "io/gguf.h"
#include "model/tokenizer_gguf.h"
#include "tessera/core.h"

namespace {

template <class T>
void ask(const tessera::GgufFile& file, const std::string& key) {
  try {
    file.get<T>(key);
  } catch (const tessera::Error&) {  // NOLINT(bugprone-empty-catch): another type
  }
}

void use(const tessera::GgufFile& file) {
  for (const std::string& key : file.keys()) {
    ask<std::int64_t>(file, key);
    ask<double>(file, key);
    ask<std::string>(file, key);
    ask<std::vector<bool>>(file, key);
    ask<std::vector<std::int64_t>>(file, key);
    ask<std::vector<std::string>>(file, key);
  }
  for (const auto& [name, tensor] : file.tensors()) {
    const auto bytes = file.bytes(tensor);
    const tessera::GgmlBlock block = tessera::block_of(tensor.type);
    if (tensor.elements() / block.numbers * block.bytes != static_cast<std::int64_t>(bytes.size())) __builtin_trap();
    std::vector<float> numbers(static_cast<std::size_t>(block.numbers));
    for (std::size_t at = 0; at < bytes.size(); at += static_cast<std::size_t>(block.bytes)) {
      tessera::dequantise(tensor.type, bytes.data() + at, block.numbers, numbers.data());
    }
  }
  const auto tokenizer = tessera::model::read_tokenizer(file);
  tokenizer.decode(tokenizer.encode("The quick <s> \xE4\xBD\xA0 \xFF 123\n"));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    use(tessera::GgufFile::parse(std::as_bytes(std::span(data, size)), "input"));
  } catch (const tessera::Error&) {  // NOLINT(bugprone-empty-catch): the expected answer to most inputs
  }
  return 0;
}
