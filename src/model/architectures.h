// The table of supported architectures: what each says differently in config.json.
#pragma once

#include <string_view>

#include "model/config_reader.h"
#include "tessera/model.h"

namespace tessera::model {

/// What read_config() leaves to the architecture.
struct Architecture {
  ArchitectureInfo info;
  /// Fills what differs from Llama. Sizes, token ids and the number of layers are in place.
  void (*read)(const ConfigReader& reader, ModelConfig& config) = nullptr;
  bool tied_head = false;                ///< when config.json does not say
  std::int64_t head_dim = 0;             ///< when config.json does not say; 0: hidden_size / num_attention_heads
  double rope_theta = 10000;             ///< the same
  std::string_view activation = "silu";  ///< the same
};

/// Throws Error that names an unknown model_type or class and lists those there are.
const Architecture& find_architecture(const ConfigReader& reader);

/// The configuration of the text part of a model that also reads images, with what such files leave to their readers;
/// any other configuration as it is.
Json text_config(const Json& json, std::string_view name);

/// Reads `rope_scaling`, `rope_parameters` and what stands beside them. `theta` is the default. Throws Error for types
/// that are not supported.
void read_rope(const ConfigReader& reader, double theta, ModelConfig& config);

}  // namespace tessera::model
