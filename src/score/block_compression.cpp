#include "score/block_compression.h"

#include <algorithm>

namespace tessera::score {

namespace {

/// out[columns] += in[rows] x matrix [rows][columns].
void add_product(const float* in, const std::vector<float>& matrix, std::int64_t rows, std::int64_t columns,
                 float* out) {
  for (std::int64_t i = 0; i < rows; ++i) {
    const float* row = matrix.data() + i * columns;
    const float factor = in[i];
    for (std::int64_t j = 0; j < columns; ++j) out[j] += factor * row[j];
  }
}

/// d_in[rows] += matrix x d_out, d_matrix += in x d_out^T.
void add_product_gradient(const float* in, const std::vector<float>& matrix, std::int64_t rows, std::int64_t columns,
                          const float* d_out, float* d_in, std::vector<float>& d_matrix) {
  for (std::int64_t i = 0; i < rows; ++i) {
    const float* row = matrix.data() + i * columns;
    float* d_row = d_matrix.data() + i * columns;
    float sum = 0;
    for (std::int64_t j = 0; j < columns; ++j) {
      sum += row[j] * d_out[j];
      d_row[j] += in[i] * d_out[j];
    }
    d_in[i] += sum;
  }
}

}  // namespace

void BlockCompression::block(const float* rows, std::int64_t token, const CompressionWeights& weights,
                             std::vector<float>& out) const {
  const float* first = rows + token * stride * dim;
  out.assign(first, first + length * dim);
  if (weights.positions.empty()) return;
  for (std::size_t i = 0; i < out.size(); ++i) out[i] += weights.positions[i];
}

void BlockCompression::forward(const float* rows, std::int64_t n, const CompressionWeights& weights, float* out) const {
  std::vector<float> x;
  std::vector<float> between(static_cast<std::size_t>(hidden));
  std::fill_n(out, count(n) * dim, 0.0F);
  for (std::int64_t token = 0; token < count(n); ++token, out += dim) {
    block(rows, token, weights, x);
    if (kind == CompressionKind::linear) {
      add_product(x.data(), weights.linear, length * dim, dim, out);
    } else if (kind == CompressionKind::mlp) {
      std::fill(between.begin(), between.end(), 0.0F);
      add_product(x.data(), weights.hidden, length * dim, hidden, between.data());
      for (float& h : between) h = std::max(h, 0.0F);
      add_product(between.data(), weights.output, hidden, dim, out);
    } else {
      for (std::int64_t p = 0; p < length; ++p) {
        const float weight = kind == CompressionKind::pool ? weights.pool[static_cast<std::size_t>(p)]
                                                           : 1.0F / static_cast<float>(length);
        for (std::int64_t d = 0; d < dim; ++d) out[d] += weight * x[static_cast<std::size_t>(p * dim + d)];
      }
    }
  }
}

void BlockCompression::backward(const float* rows, std::int64_t n, const CompressionWeights& weights,
                                const float* d_out, float* d_rows, CompressionWeights& d_weights) const {
  std::vector<float> x;
  std::vector<float> d_x(static_cast<std::size_t>(length * dim));
  std::vector<float> between(static_cast<std::size_t>(hidden));
  std::vector<float> d_between(static_cast<std::size_t>(hidden));
  for (std::int64_t token = 0; token < count(n); ++token, d_out += dim) {
    if (kind != CompressionKind::mean) block(rows, token, weights, x);
    std::fill(d_x.begin(), d_x.end(), 0.0F);
    if (kind == CompressionKind::linear) {
      add_product_gradient(x.data(), weights.linear, length * dim, dim, d_out, d_x.data(), d_weights.linear);
    } else if (kind == CompressionKind::mlp) {
      std::fill(between.begin(), between.end(), 0.0F);
      std::fill(d_between.begin(), d_between.end(), 0.0F);
      add_product(x.data(), weights.hidden, length * dim, hidden, between.data());
      for (float& h : between) h = std::max(h, 0.0F);
      add_product_gradient(between.data(), weights.output, hidden, dim, d_out, d_between.data(), d_weights.output);
      for (std::size_t i = 0; i < between.size(); ++i) d_between[i] = between[i] > 0 ? d_between[i] : 0.0F;
      add_product_gradient(x.data(), weights.hidden, length * dim, hidden, d_between.data(), d_x.data(),
                           d_weights.hidden);
    } else {
      for (std::int64_t p = 0; p < length; ++p) {
        const bool pooled = kind == CompressionKind::pool;
        const float weight = pooled ? weights.pool[static_cast<std::size_t>(p)] : 1.0F / static_cast<float>(length);
        for (std::int64_t d = 0; d < dim; ++d) d_x[static_cast<std::size_t>(p * dim + d)] = weight * d_out[d];
        if (!pooled) continue;
        float sum = 0;
        for (std::int64_t d = 0; d < dim; ++d) sum += x[static_cast<std::size_t>(p * dim + d)] * d_out[d];
        d_weights.pool[static_cast<std::size_t>(p)] += sum;
      }
    }
    float* first = d_rows + token * stride * dim;
    for (std::size_t i = 0; i < d_x.size(); ++i) {
      first[i] += d_x[i];
      if (!d_weights.positions.empty()) d_weights.positions[i] += d_x[i];
    }
  }
}

}  // namespace tessera::score
