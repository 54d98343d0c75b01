// Weights in a GGUF file.
#pragma once

#include <memory>

#include "io/gguf.h"
#include "model/matrix.h"

namespace tessera::model {

/// Answers to the names of the Hugging Face layout with the tensors of the file, as they lie there: numbers in blocks
/// stay in their blocks.
std::unique_ptr<TensorSource> open_gguf(GgufFile file);

}  // namespace tessera::model
