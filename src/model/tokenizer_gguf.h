// The tokenizer in the metadata of a GGUF file.
#pragma once

#include "io/gguf.h"
#include "model/tokenizer.h"

namespace tessera::model {

/// Reads tokenizer.ggml.*: byte-level BPE (model "gpt2") and sentencepiece BPE ("llama"). Throws Error naming key and
/// value for what is missing or not supported.
Tokenizer read_tokenizer(const GgufFile& file);

}  // namespace tessera::model
