// Tensors q, k, v of a safetensors file as the inputs of an attention call.
#pragma once

#include <cstddef>
#include <deque>
#include <string>
#include <vector>

#include "io/safetensors.h"
#include "tessera/attention.h"

namespace tessera::cli {

/// An open file; the inputs look at its mapping.
class InputFile {
 public:
  /// q, k and v must have 4 axes (batch, heads, tokens, dim). Every other tensor of f32, bf16 or f16 with at most 4
  /// axes becomes a side input, for methods that read more (gates, decays, learned weights). Throws Error.
  explicit InputFile(const std::string& path);

  const AttentionInputs& inputs() const { return inputs_; }
  const SafetensorsFile& file() const { return file_; }

 private:
  TensorView view(const std::string& name);
  TensorView attention_tensor(const std::string& name);

  SafetensorsFile file_;
  std::deque<std::vector<std::byte>> storage_;  ///< copies of what the file leaves unaligned
  AttentionInputs inputs_;
};

}  // namespace tessera::cli
