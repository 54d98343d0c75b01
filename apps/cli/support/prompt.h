// The text that a model reads.
#pragma once

#include <string>

namespace tessera::cli {

/// Content of the file, or of standard input for "-". Throws Error for what cannot be read and for more bytes than
/// files of text may have.
std::string read_prompt(const std::string& path);

}  // namespace tessera::cli
