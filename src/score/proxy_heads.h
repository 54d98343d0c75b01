// Groups of query heads stood for by one head each: the mean of their queries and of the keys they read.
//
// ProxyAttn (arXiv 2509.24745) scores tiles with a few such heads; DHSA (2510.24606) with one for the whole layer.
#pragma once

#include <cstdint>
#include <vector>

#include "tessera/attention.h"

namespace tessera::score {

/// Owns the float tensors of the proxies; `problem` and `inputs` describe them like any other call, without values.
class ProxyHeads {
 public:
  /// `proxies` divides q_heads into groups of consecutive heads. A kv head counts once for each query head that reads
  /// it. The mean is taken as the tensors are, RoPE applied: all heads are rotated alike.
  ProxyHeads(const Problem& problem, const AttentionInputs& inputs, std::int64_t proxies, int threads);

  const Problem& problem() const { return problem_; }
  const AttentionInputs& inputs() const { return inputs_; }

 private:
  Problem problem_;
  AttentionInputs inputs_;
  std::vector<float> queries_;  ///< [batch, proxies, q_len, head_dim]
  std::vector<float> keys_;     ///< [batch, proxies, kv_len, head_dim]
};

}  // namespace tessera::score
