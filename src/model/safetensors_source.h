// Weights in safetensors files of the Hugging Face layout.
#pragma once

#include <filesystem>
#include <memory>

#include "model/matrix.h"
#include "tessera/model.h"

namespace tessera::model {

/// model.safetensors, or the shards that model.safetensors.index.json names. Throws Error when there is neither, and
/// for an index that lies.
std::unique_ptr<TensorSource> open_safetensors(const std::filesystem::path& folder, const LoadOptions& options);

}  // namespace tessera::model
