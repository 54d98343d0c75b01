// The shape of a model from the metadata of a GGUF file.
#pragma once

#include <string>

#include "io/gguf.h"
#include "tessera/model.h"

namespace tessera::model {

/// Throws Error naming key and value for what is missing or not supported; an unknown architecture with those that are
/// known. The result has passed validate().
ModelConfig read_config(const GgufFile& file);

/// The architectures of GGUF files that can be read, for messages.
std::string gguf_architecture_names();

}  // namespace tessera::model
