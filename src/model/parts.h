// What a loaded model consists of.
#pragma once

#include <optional>
#include <string>

#include "model/tokenizer.h"
#include "model/weights.h"
#include "tessera/model.h"

namespace tessera {

struct Model::Parts {
  ModelConfig config;
  model::Weights weights;
  model::Tokenizer tokenizer;
  std::optional<std::string> chat_template;  ///< as the files have it
  std::string name;                          ///< of the folder or file, for messages
};

}  // namespace tessera
