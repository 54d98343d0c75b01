// Which kv heads look far back: the configuration that searches for retrieval heads write.
#pragma once

#include <cstdint>
#include <vector>

#include "methods/parameters.h"

namespace tessera {

/// Per (layer, kv head): how much it is a retrieval head, in [0, 1].
struct HeadClasses {
  std::int64_t sink = -1;                  ///< first tokens that the other heads keep; -1: not given
  std::int64_t recent = -1;                ///< last tokens that they keep
  std::vector<std::vector<double>> gates;  ///< [layer][kv head]

  /// Retrieval heads: a gate of at least `threshold`, or, when `sparsity` is not negative, all but the
  /// floor(sparsity * heads) lowest gates (among equals the later heads are the lower).
  std::vector<std::vector<bool>> retrieval(double threshold, double sparsity) const;
};

/// Reads {"retrieval": [[gate, ...] per layer], "sink": tokens, "recent": tokens}, of which the last two may be
/// missing, or a head table (methods/head_table.h): gates as given, else 1 for class full and 0 for spans; sink and
/// recent of spans that do not grow, which must agree. Throws Error naming the file and the place of anything else.
HeadClasses read_head_classes(const Configuration& configuration);

}  // namespace tessera
