// Compression of overlapping blocks of tokens to one vector each, by mean or by learned weights, and its derivative.
//
// Native Sparse Attention (arXiv 2502.11089), section 3.3.1: token t covers rows [t * stride, t * stride + length); the
// ragged tail is not compressed.
#pragma once

#include <cstdint>
#include <vector>

namespace tessera::score {

enum class CompressionKind : std::uint8_t {
  mean,    ///< mean of the rows
  pool,    ///< sum of the rows with one weight per place
  linear,  ///< one matrix over the flattened block
  mlp      ///< two matrices with ReLU between
};

/// Weights of one head, or their gradients. What the kind does not use is empty.
struct CompressionWeights {
  std::vector<float> positions;  ///< [length][dim] added to the rows of every block; empty: none
  std::vector<float> pool;       ///< [length]
  std::vector<float> linear;     ///< [length * dim][dim]
  std::vector<float> hidden;     ///< [length * dim][hidden]
  std::vector<float> output;     ///< [hidden][dim]
};

struct BlockCompression {
  CompressionKind kind = CompressionKind::mean;
  std::int64_t length = 32;
  std::int64_t stride = 16;  ///< divides length
  std::int64_t dim = 0;
  std::int64_t hidden = 0;

  std::int64_t count(std::int64_t rows) const { return rows < length ? 0 : (rows - length) / stride + 1; }
  /// out [count(n)][dim] from rows [n][dim].
  void forward(const float* rows, std::int64_t n, const CompressionWeights& weights, float* out) const;
  /// Adds to d_rows [n][dim] and to d_weights (sized like the weights) what d_out [count(n)][dim] asks for. Means read
  /// no `rows`.
  void backward(const float* rows, std::int64_t n, const CompressionWeights& weights, const float* d_out, float* d_rows,
                CompressionWeights& d_weights) const;

 private:
  void block(const float* rows, std::int64_t token, const CompressionWeights& weights, std::vector<float>& out) const;
};

}  // namespace tessera::score
