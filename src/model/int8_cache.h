// Keys and values in 8 bits, with a step and a minimum per token and head.
#pragma once

#include <memory>
#include <vector>

#include "tessera/cache.h"

namespace tessera::model {

/// Room for one layer's rows as floats, [kv_heads][tokens][dim]: the caches of a session use it in turn.
struct WidenedRows {
  std::vector<float> keys;
  std::vector<float> values;
};

/// A cache that keeps all but the newest tokens (fewer than 64 of them, and those of the pass that runs) in 8 bits.
/// Dense decoding multiplies the codes; every other call widens the layer into `widened`, which must outlive the cache,
/// and attends by its method. `plain`: scores are neither capped nor limited to a window, so that codes may be
/// multiplied. A pass whose rows were quantised cannot be taken back.
std::unique_ptr<LayerCache> make_int8_cache(const LayerCacheShape& shape, WidenedRows& widened, bool plain);

}  // namespace tessera::model
