#include "score/chunk_boundaries.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "core/parallel.h"
#include "score/product.h"
#include "score/row_softmax.h"
#include "score/score_order.h"

namespace tessera::score {

namespace {

constexpr std::int64_t kGapsAtOnce = 64;
constexpr float kNormEpsilon = 1e-5F;
constexpr float kCosineEpsilon = 1e-6F;

/// out [rows][out_dim] = in [rows][in_dim] * weight^T + bias.
void linear(std::span<const float> in, std::int64_t rows, std::int64_t in_dim, std::span<const float> weight,
            std::span<const float> bias, std::vector<float>& out) {
  const auto out_dim = static_cast<std::int64_t>(bias.size());
  out.resize(static_cast<std::size_t>(rows * out_dim));
  multiply_transposed(in.data(), rows, in_dim, weight.data(), out_dim, in_dim, in_dim, 1.0F, out.data(), out_dim);
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = 0; c < out_dim; ++c) out[r * out_dim + c] += bias[c];
  }
}

float dot(const float* a, const float* b, std::int64_t count) {
  constexpr int lanes = 8;
  std::array<float, lanes> sum{};
  std::int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    for (int l = 0; l < lanes; ++l) sum[l] += a[i + l] * b[i + l];
  }
  for (; i < count; ++i) sum[0] += a[i] * b[i];
  return ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
}

float cosine(const float* a, const float* b, std::int64_t count) {
  const float size_a = std::max(std::sqrt(dot(a, a, count)), kCosineEpsilon);
  const float size_b = std::max(std::sqrt(dot(b, b, count)), kCosineEpsilon);
  return dot(a, b, count) / (size_a * size_b);
}

/// Self-attention among `tokens` rows of projected [queries, keys, values]; out [tokens][channels].
void attend_window(const BoundaryWeights& weights, const float* projected, std::int64_t tokens, float* out) {
  const std::int64_t channels = weights.channels;
  const std::int64_t dim = channels / weights.heads;
  const float scale = 1.0F / std::sqrt(static_cast<float>(dim));
  std::vector<float> p(static_cast<std::size_t>(tokens));
  std::fill_n(out, tokens * channels, 0.0F);
  for (std::int64_t head = 0; head < weights.heads; ++head) {
    for (std::int64_t i = 0; i < tokens; ++i) {
      const float* q = projected + i * 3 * channels + head * dim;
      for (std::int64_t j = 0; j < tokens; ++j) {
        p[j] = scale * dot(q, projected + (j * 3 + 1) * channels + head * dim, dim);
      }
      softmax_row(p);
      float* to = out + i * channels + head * dim;
      for (std::int64_t j = 0; j < tokens; ++j) {
        const float* v = projected + (j * 3 + 2) * channels + head * dim;
        for (std::int64_t d = 0; d < dim; ++d) to[d] += p[j] * v[d];
      }
    }
  }
}

void layer_norm(const BoundaryWeights& weights, float* row) {
  const std::int64_t channels = weights.channels;
  float mean = 0;
  for (std::int64_t c = 0; c < channels; ++c) mean += row[c];
  mean /= static_cast<float>(channels);
  float variance = 0;
  for (std::int64_t c = 0; c < channels; ++c) variance += (row[c] - mean) * (row[c] - mean);
  const float inverse = 1.0F / std::sqrt(variance / static_cast<float>(channels) + kNormEpsilon);
  for (std::int64_t c = 0; c < channels; ++c) {
    row[c] = (row[c] - mean) * inverse * weights.norm_weight[c] + weights.norm_bias[c];
  }
}

/// One side of a gap as one vector.
void pool_side(const BoundaryWeights& weights, const float* rows, float* out) {
  const std::int64_t channels = weights.channels;
  std::vector<float> share(static_cast<std::size_t>(weights.window), 1.0F / static_cast<float>(weights.window));
  if (!weights.pool_gate.empty()) {
    for (std::int64_t i = 0; i < weights.window; ++i) {
      share[i] = dot(rows + i * channels, weights.pool_gate.data(), channels);
    }
    softmax_row(share);
  }
  std::fill_n(out, channels, 0.0F);
  for (std::int64_t i = 0; i < weights.window; ++i) {
    for (std::int64_t c = 0; c < channels; ++c) out[c] += share[i] * rows[i * channels + c];
  }
}

}  // namespace

std::vector<float> predict_boundaries(const BoundaryWeights& weights, std::span<const float> rows, int threads) {
  const std::int64_t channels = weights.channels;
  const std::int64_t tokens = static_cast<std::int64_t>(rows.size()) / channels;
  const std::int64_t window = weights.window;
  const std::int64_t features = 4 * channels + 1;
  std::vector<float> scores(static_cast<std::size_t>(tokens));
  parallel_for((tokens + kGapsAtOnce - 1) / kGapsAtOnce, threads, [&](std::int64_t chunk, int) {
    const std::int64_t first = chunk * kGapsAtOnce;
    const std::int64_t gaps = std::min(kGapsAtOnce, tokens - first);
    // Tokens first - window + 1 ... of the first gap to ... + window of the last one; zeros beyond the ends.
    const std::int64_t count = gaps + 2 * window - 1;
    std::vector<float> in(static_cast<std::size_t>(count * channels), 0.0F);
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t token = first - window + 1 + i;
      if (token >= 0 && token < tokens) std::copy_n(rows.data() + token * channels, channels, in.data() + i * channels);
    }
    std::vector<float> projected;
    linear(in, count, channels, weights.in_weight, weights.in_bias, projected);
    std::vector<float> mixed(static_cast<std::size_t>(gaps * 2 * window * channels));
    for (std::int64_t g = 0; g < gaps; ++g) {
      attend_window(weights, projected.data() + g * 3 * channels, 2 * window, mixed.data() + g * 2 * window * channels);
    }
    std::vector<float> encoded;
    linear(mixed, gaps * 2 * window, channels, weights.out_weight, weights.out_bias, encoded);
    for (std::int64_t i = 0; i < gaps * 2 * window; ++i) layer_norm(weights, encoded.data() + i * channels);
    std::vector<float> fused(static_cast<std::size_t>(gaps * features));
    for (std::int64_t g = 0; g < gaps; ++g) {
      float* left = fused.data() + g * features;
      float* right = left + channels;
      pool_side(weights, encoded.data() + g * 2 * window * channels, left);
      pool_side(weights, encoded.data() + (g * 2 + 1) * window * channels, right);
      for (std::int64_t c = 0; c < channels; ++c) {
        left[2 * channels + c] = std::fabs(left[c] - right[c]);
        left[3 * channels + c] = left[c] * right[c];
      }
      left[4 * channels] = cosine(left, right, channels);
    }
    std::vector<float> hidden;
    linear(fused, gaps, features, weights.hidden_weight, weights.hidden_bias, hidden);
    const auto width = static_cast<std::int64_t>(weights.hidden_bias.size());
    for (std::int64_t g = 0; g < gaps; ++g) {
      float sum = weights.score_bias;
      for (std::int64_t i = 0; i < width; ++i) {
        const float x = hidden[g * width + i];
        sum += weights.score_weight[i] * (x < 0 ? 0.0F : x);
      }
      scores[first + g] = sum;
    }
  });
  return scores;
}

std::vector<float> boundaries_by_cosine(std::span<const float> rows, std::int64_t channels, std::int64_t window,
                                        int threads) {
  const std::int64_t tokens = static_cast<std::int64_t>(rows.size()) / channels;
  std::vector<float> scores(static_cast<std::size_t>(tokens));
  parallel_for((tokens + kGapsAtOnce - 1) / kGapsAtOnce, threads, [&](std::int64_t chunk, int) {
    std::vector<float> sides(static_cast<std::size_t>(2 * channels));
    for (std::int64_t t = chunk * kGapsAtOnce; t < std::min(tokens, (chunk + 1) * kGapsAtOnce); ++t) {
      std::fill(sides.begin(), sides.end(), 0.0F);
      for (std::int64_t i = std::max<std::int64_t>(0, t - window + 1); i < std::min(tokens, t + window + 1); ++i) {
        float* to = sides.data() + (i <= t ? 0 : channels);
        const float* from = rows.data() + i * channels;
        for (std::int64_t c = 0; c < channels; ++c) to[c] += from[c];
      }
      scores[t] = -cosine(sides.data(), sides.data() + channels, channels);
    }
  });
  return scores;
}

std::vector<std::int32_t> pick_boundaries(std::span<const float> scores, float least, std::int64_t window,
                                          std::int64_t apart, std::int64_t most) {
  const auto tokens = static_cast<std::int64_t>(scores.size());
  std::vector<std::int32_t> candidates;
  for (std::int64_t t = window - 1; t < tokens - window; ++t) {
    if (scores[t] > least || std::isnan(scores[t])) candidates.push_back(static_cast<std::int32_t>(t));
  }
  std::sort(candidates.begin(), candidates.end(), ScoreOrder{scores});
  std::vector<std::int32_t> picked;
  std::vector<std::uint8_t> blocked(scores.size(), 0);
  for (const std::int32_t t : candidates) {
    if (static_cast<std::int64_t>(picked.size()) >= most) break;
    if (blocked[t] != 0) continue;
    picked.push_back(t);
    for (std::int64_t i = std::max<std::int64_t>(0, t - apart); i <= std::min(tokens - 1, t + apart); ++i) {
      blocked[i] = 1;
    }
  }
  std::sort(picked.begin(), picked.end());
  return picked;
}

std::vector<float> pool_chunks(std::span<const float> rows, std::int64_t channels,
                               std::span<const std::int32_t> borders, int threads) {
  const std::int64_t chunks = std::max<std::int64_t>(0, static_cast<std::int64_t>(borders.size()) - 1);
  std::vector<float> pooled(static_cast<std::size_t>(chunks * channels), 0.0F);
  parallel_for(
      chunks, threads,
      [&](std::int64_t chunk, int) {
        float* to = pooled.data() + chunk * channels;
        const std::int64_t begin = borders[chunk];
        const std::int64_t end = borders[chunk + 1];
        for (std::int64_t i = begin; i < end; ++i) {
          for (std::int64_t c = 0; c < channels; ++c) to[c] += rows[i * channels + c];
        }
        const float factor = 1.0F / std::sqrt(static_cast<float>(end - begin));
        for (std::int64_t c = 0; c < channels; ++c) to[c] *= factor;
      },
      16);
  return pooled;
}

}  // namespace tessera::score
