// Drives a layer's cache token by token, beside attention in float64 over any set of kept tokens.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "tessera/method.h"

namespace tessera::test {

struct CacheCaseShape {
  std::int64_t q_heads = 4;
  std::int64_t kv_heads = 2;
  std::int64_t head_dim = 16;
  std::int64_t value_dim = 12;
  DType dtype = DType::f32;
  std::int64_t tokens = 400;
};

/// Random queries, keys and values of a sequence, and the cache of one of its layers.
class CacheCase {
 public:
  explicit CacheCase(const CacheCaseShape& shape, std::uint32_t seed = 1) : shape_(shape) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    q_.resize(static_cast<std::size_t>(shape.tokens * shape.q_heads * shape.head_dim));
    k_.resize(static_cast<std::size_t>(shape.tokens * shape.kv_heads * shape.head_dim));
    v_.resize(static_cast<std::size_t>(shape.tokens * shape.kv_heads * shape.value_dim));
    for (float& x : q_) x = 2 * normal(random);
    // Keys and values as the cache will round them.
    for (std::vector<float>* tensor : {&k_, &v_}) {
      for (float& x : *tensor) x = round(normal(random));
    }
  }

  LayerCacheShape layer_shape(bool own_prompt = false) const {
    return {.q_heads = shape_.q_heads,
            .kv_heads = shape_.kv_heads,
            .head_dim = shape_.head_dim,
            .value_dim = shape_.value_dim,
            .dtype = shape_.dtype,
            .page_size = 16,
            .capacity = shape_.tokens,
            .own_prompt = own_prompt};
  }
  const CacheCaseShape& shape() const { return shape_; }

  float* q(std::int64_t token, std::int64_t head) {
    return q_.data() + (token * shape_.q_heads + head) * shape_.head_dim;
  }
  float* k(std::int64_t token, std::int64_t head) {
    return k_.data() + (token * shape_.kv_heads + head) * shape_.head_dim;
  }
  float* v(std::int64_t token, std::int64_t head) {
    return v_.data() + (token * shape_.kv_heads + head) * shape_.value_dim;
  }
  void set_k(std::int64_t token, std::int64_t head, const std::function<float(std::int64_t)>& value) {
    for (std::int64_t d = 0; d < shape_.head_dim; ++d) k(token, head)[d] = round(value(d));
  }

  /// Runs tokens [first, first + count) through the cache: outputs [count][q_heads][value_dim].
  std::vector<float> run(LayerCache& cache, const Method& method, std::int64_t first, std::int64_t count, bool prompt,
                         const PlanContext& context = {}) {
    EXPECT_EQ(cache.tokens(), first);
    // In two parts, as a decoder appends groups of rows.
    const std::int64_t half = count / 2;
    if (half > 0) cache.append(half, k(first, 0), v(first, 0), 2);
    cache.append(count - half, k(first + half, 0), v(first + half, 0), 2);
    std::vector<float> o(static_cast<std::size_t>(count * shape_.q_heads * shape_.value_dim));
    CacheCall call;
    call.method = &method;
    call.prompt = prompt;
    call.q = view_of(q(first, 0), DType::f32, {1, shape_.q_heads, count, shape_.head_dim}, Layout::bnhd);
    call.outputs = {mutable_view_of(o.data(), DType::f32, {1, shape_.q_heads, count, shape_.value_dim}, Layout::bnhd),
                    {}};
    cache.attend(call, context);
    return o;
  }

  /// Decodes the token after a prompt, takes it back and decodes it again, the same; the prompt itself stays. Returns
  /// the output.
  std::vector<float> expect_token_taken_back(LayerCache& cache, const Method& method, std::int64_t prompt) {
    std::vector<float> first = run(cache, method, prompt, 1, false);
    EXPECT_TRUE(cache.truncate(prompt));
    EXPECT_EQ(run(cache, method, prompt, 1, false), first);
    EXPECT_FALSE(cache.truncate(prompt - 1));
    EXPECT_EQ(cache.tokens(), prompt + 1);
    return first;
  }

  /// softmax(scale * q.k) of a query over the keys where sees(j), in float64; 0 elsewhere.
  std::vector<double> probabilities(std::int64_t token, std::int64_t q_head,
                                    const std::function<bool(std::int64_t)>& sees) {
    const std::int64_t head = q_head / (shape_.q_heads / shape_.kv_heads);
    std::vector<double> p(static_cast<std::size_t>(token + 1), 0.0);
    double sum = 0;
    for (std::int64_t j = 0; j <= token; ++j) {
      if (!sees(j)) continue;
      double score = 0;
      for (std::int64_t d = 0; d < shape_.head_dim; ++d) {
        score += static_cast<double>(q(token, q_head)[d]) * static_cast<double>(k(j, head)[d]);
      }
      p[static_cast<std::size_t>(j)] = std::exp(score / std::sqrt(static_cast<double>(shape_.head_dim)));
      sum += p[static_cast<std::size_t>(j)];
    }
    for (double& x : p) x /= sum;
    return p;
  }

  /// Compares outputs of run() with attention over the keys j where sees(kv head, token, j).
  void expect_attention(const std::vector<float>& o, std::int64_t first,
                        const std::function<bool(std::int64_t, std::int64_t, std::int64_t)>& sees) {
    const double tolerance = 2e-5;
    const std::int64_t row = shape_.q_heads * shape_.value_dim;
    for (std::int64_t token = first; token < first + static_cast<std::int64_t>(o.size()) / row; ++token) {
      for (std::int64_t q_head = 0; q_head < shape_.q_heads; ++q_head) {
        const std::int64_t head = q_head / (shape_.q_heads / shape_.kv_heads);
        const auto p = probabilities(token, q_head, [&](std::int64_t j) { return sees(head, token, j); });
        for (std::int64_t d = 0; d < shape_.value_dim; ++d) {
          double expected = 0;
          for (std::int64_t j = 0; j <= token; ++j) {
            expected += p[static_cast<std::size_t>(j)] * static_cast<double>(v(j, head)[d]);
          }
          ASSERT_NEAR(o[static_cast<std::size_t>((token - first) * row + q_head * shape_.value_dim + d)], expected,
                      tolerance)
              << "token " << token << ", query head " << q_head;
        }
      }
    }
  }

  /// A row of K or V as a cache is expected to hold it: token `j` of a kv head.
  using StoredRow = std::function<std::vector<double>(std::int64_t head, std::int64_t j)>;
  StoredRow exact_key() {
    return [this](std::int64_t head, std::int64_t j) {
      return std::vector<double>(k(j, head), k(j, head) + shape_.head_dim);
    };
  }
  StoredRow exact_value() {
    return [this](std::int64_t head, std::int64_t j) {
      return std::vector<double>(v(j, head), v(j, head) + shape_.value_dim);
    };
  }

  /// Compares outputs of run() with attention over all earlier tokens, whose rows are key(head, j) and value(head, j).
  void expect_attention_to(const std::vector<float>& o, std::int64_t first, const StoredRow& key,
                           const StoredRow& value, double tolerance) {
    const std::int64_t row = shape_.q_heads * shape_.value_dim;
    const std::int64_t last = first + static_cast<std::int64_t>(o.size()) / row;
    for (std::int64_t head = 0; head < shape_.kv_heads; ++head) {
      std::vector<std::vector<double>> keys;
      std::vector<std::vector<double>> values;
      for (std::int64_t j = 0; j < last; ++j) {
        keys.push_back(key(head, j));
        values.push_back(value(head, j));
      }
      const std::int64_t group = shape_.q_heads / shape_.kv_heads;
      for (std::int64_t q_head = head * group; q_head < (head + 1) * group; ++q_head) {
        for (std::int64_t token = first; token < last; ++token) {
          const auto expected = attention_of(token, q_head, keys, values);
          for (std::int64_t d = 0; d < shape_.value_dim; ++d) {
            ASSERT_NEAR(o[static_cast<std::size_t>((token - first) * row + q_head * shape_.value_dim + d)],
                        expected[static_cast<std::size_t>(d)], tolerance)
                << "token " << token << ", query head " << q_head;
          }
        }
      }
    }
  }

 private:
  /// Attention of one query to the keys of tokens up to its own, in float64.
  std::vector<double> attention_of(std::int64_t token, std::int64_t q_head,
                                   const std::vector<std::vector<double>>& keys,
                                   const std::vector<std::vector<double>>& values) {
    std::vector<double> out(static_cast<std::size_t>(shape_.value_dim), 0.0);
    double sum = 0;
    for (std::size_t j = 0; j <= static_cast<std::size_t>(token); ++j) {
      double score = 0;
      for (std::size_t d = 0; d < keys[j].size(); ++d) score += static_cast<double>(q(token, q_head)[d]) * keys[j][d];
      const double p = std::exp(score / std::sqrt(static_cast<double>(shape_.head_dim)));
      sum += p;
      for (std::size_t d = 0; d < out.size(); ++d) out[d] += p * values[j][d];
    }
    for (double& x : out) x /= sum;
    return out;
  }

  float round(float x) const {
    if (shape_.dtype == DType::bf16) return bf16_to_float(float_to_bf16(x));
    if (shape_.dtype == DType::f16) return f16_to_float(float_to_f16(x));
    return x;
  }

  CacheCaseShape shape_;
  std::vector<float> q_;
  std::vector<float> k_;
  std::vector<float> v_;
};

/// Shapes that every cache must handle: groups, one head, odd sizes, narrow types.
inline std::vector<CacheCaseShape> cache_shapes() {
  return {{},
          {.q_heads = 3, .kv_heads = 1, .head_dim = 10, .value_dim = 7},
          {.q_heads = 3, .kv_heads = 3, .head_dim = 32, .value_dim = 32},
          {.dtype = DType::bf16},
          {.q_heads = 6, .kv_heads = 2, .dtype = DType::f16}};
}

}  // namespace tessera::test
