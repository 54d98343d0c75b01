// From probabilities of compressed tokens to the importance of selection blocks.
//
// Native Sparse Attention (arXiv 2502.11089), equation 9: with blocks of r strides and compressed tokens of e strides,
// importance[j] = sum_{m < r} sum_{n < e} p[r j + m + n - (e - 1)]: every compressed token that overlaps the block
// counts with the strides they share. (Published as p[r j - m - n], with blocks and tokens counted from one.)
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

namespace tessera::score {

/// importance[j] += the sum above for one row of probabilities; tokens out of range count 0.
inline void add_block_importance(std::span<const float> probabilities, std::int64_t block_strides,
                                 std::int64_t token_strides, std::span<float> importance) {
  const auto tokens = static_cast<std::int64_t>(probabilities.size());
  for (std::size_t j = 0; j < importance.size(); ++j) {
    const std::int64_t first = block_strides * static_cast<std::int64_t>(j) - (token_strides - 1);
    const std::int64_t end = std::min(first + block_strides + token_strides - 1, tokens);
    for (std::int64_t t = std::max<std::int64_t>(first, 0); t < end; ++t) {
      // Pairs (m, n) with m + n = t - first.
      const std::int64_t place = t - first;
      const std::int64_t shared =
          std::min({place + 1, block_strides, token_strides, block_strides + token_strides - 1 - place});
      importance[j] += static_cast<float>(shared) * probabilities[static_cast<std::size_t>(t)];
    }
  }
}

}  // namespace tessera::score
