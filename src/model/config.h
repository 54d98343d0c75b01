// config.json of the Hugging Face layout.
#pragma once

#include <string_view>

#include "io/json.h"
#include "tessera/model.h"

namespace tessera::model {

/// Checks and reads a configuration. `name` stands for it in messages. Throws Error for missing keys, sizes out of
/// range, an architecture that is not supported (the message lists those that are), and for whatever else changes the
/// computation in a way that is not supported. The result has passed validate().
ModelConfig read_config(const Json& json, std::string_view name);

}  // namespace tessera::model
