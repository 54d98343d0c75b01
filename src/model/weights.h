// The weights of a decoder, from safetensors files of the Hugging Face layout.
#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "io/safetensors.h"
#include "tessera/model.h"

namespace tessera::model {

/// A float32 tensor: a view of the mapped file where that holds aligned float32, else a widened copy.
struct Weight {
  std::span<const float> values;
  std::vector<float> storage;
};

struct LayerWeights {
  Weight attention_norm;  ///< [hidden]
  Weight q, k, v;         ///< [heads * head_dim][hidden]
  Weight o;               ///< [hidden][q_heads * head_dim]
  Weight mlp_norm;        ///< [hidden]
  Weight gate, up;        ///< [intermediate][hidden]
  Weight down;            ///< [hidden][intermediate]
};

struct Weights {
  std::vector<SafetensorsFile> files;  ///< what the views refer to
  Weight embedding;                    ///< [vocab][hidden]
  std::vector<LayerWeights> layers;
  Weight norm;  ///< [hidden]
  Weight head;  ///< [vocab][hidden]; empty when tied
  const Weight& head_of(const ModelConfig& config) const { return config.tied_head ? embedding : head; }
  std::size_t heap_bytes = 0;
};

/// Reads model.safetensors, or the shards that model.safetensors.index.json names. Throws Error for missing and
/// unexpected tensors, and for wrong shapes and dtypes.
Weights load_weights(const std::filesystem::path& folder, const ModelConfig& config, int threads);

}  // namespace tessera::model
