#include "support/prompt.h"

#include <array>
#include <cstdio>

#include "core/error.h"
#include "io/json.h"

namespace tessera::cli {

std::string read_prompt(const std::string& path) {
  if (path != "-") return read_text_file(path);
  std::string text;
  std::array<char, 65536> buffer{};
  while (const std::size_t count = std::fread(buffer.data(), 1, buffer.size(), stdin)) {
    text.append(buffer.data(), count);
    require(text.size() <= JsonLimits{}.bytes, "--prompt -: more than {} bytes", JsonLimits{}.bytes);
  }
  require(std::ferror(stdin) == 0, "--prompt -: standard input cannot be read");
  return text;
}

}  // namespace tessera::cli
