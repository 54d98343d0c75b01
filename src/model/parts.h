// What a loaded model consists of.
#pragma once

#include "model/tokenizer.h"
#include "model/weights.h"
#include "tessera/model.h"

namespace tessera {

struct Model::Parts {
  ModelConfig config;
  model::Weights weights;
  model::Tokenizer tokenizer;
};

}  // namespace tessera
