// mustafar: what is pruned and when, what decoding then sees, and what memory is left.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "methods/cache_case.h"

namespace tessera {
namespace {

using test::CacheCase;
using test::CacheCaseShape;

struct Rule {
  double keys = 0.7;
  double values = 0.5;
  std::int64_t window = 20;
  std::string spec() const {
    return "mustafar:key_sparsity=" + std::to_string(keys) + ",value_sparsity=" + std::to_string(values) +
           ",window=" + std::to_string(window);
  }
};

/// The row with everything below its n-th smallest magnitude gone.
std::vector<double> pruned(const float* row, std::int64_t dim, double sparsity) {
  std::vector<float> magnitudes;
  for (std::int64_t d = 0; d < dim; ++d) magnitudes.push_back(std::fabs(row[d]));
  std::sort(magnitudes.begin(), magnitudes.end());
  const auto n = std::max<std::int64_t>(1, static_cast<std::int64_t>(sparsity * static_cast<double>(dim)));
  std::vector<double> out;
  for (std::int64_t d = 0; d < dim; ++d) {
    out.push_back(std::fabs(row[d]) >= magnitudes[static_cast<std::size_t>(n - 1)] ? row[d] : 0.0F);
  }
  return out;
}

/// Attention of tokens from `first` on, the first `compressed` tokens of the cache pruned.
void expect_output(CacheCase& input, const std::vector<float>& o, std::int64_t first, std::int64_t compressed,
                   const Rule& rule) {
  const CacheCaseShape& shape = input.shape();
  const auto key = [&](std::int64_t head, std::int64_t j) {
    return pruned(input.k(j, head), shape.head_dim, j < compressed ? rule.keys : 0);
  };
  const auto value = [&](std::int64_t head, std::int64_t j) {
    return pruned(input.v(j, head), shape.value_dim, j < compressed ? rule.values : 0);
  };
  input.expect_attention_to(o, first, key, value, 4e-5);
}

TEST(Mustafar, DecodesOverPrunedTokensAndAWholeWindow) {
  for (CacheCaseShape shape : test::cache_shapes()) {
    shape.tokens = 900;
    for (const Rule& rule : {Rule{}, Rule{0.5, 0.9, 32}, Rule{0, 0, 1}}) {
      CacheCase input(shape);
      const auto method = make_method(rule.spec());
      const auto cache = method->new_cache(input.layer_shape(), {});
      // A prompt below the first batch stays whole.
      std::vector<float> o = input.run(*cache, *method, 0, 256, true);
      cache->finish_prefill({});
      o = input.run(*cache, *method, 256, 1, false);
      expect_output(input, o, 256, 0, rule);
      // A further prompt completes two batches; its own queries still see them whole or not at all pruned before.
      const std::int64_t before = rule.window == 1 ? 256 : 0;
      o = input.run(*cache, *method, 257, 300, true);
      expect_output(input, o, 257, before, rule);
      cache->finish_prefill({});
      std::int64_t token = 557;
      std::int64_t compressed = (token - rule.window) / 256 * 256;
      // Decoding completes the third one on the way.
      for (; token < 557 + 260; ++token) {
        o = input.run(*cache, *method, token, 1, false);
        if (token % 16 == 0 || token > 785) expect_output(input, o, token, compressed, rule);
        compressed = std::max(compressed, (token + 1 - rule.window) / 256 * 256);
      }
      EXPECT_EQ(compressed, 768 <= token - rule.window ? 768 : 512);
      EXPECT_EQ(cache->rows_kept(), token * shape.kv_heads);
    }
  }
}

TEST(Mustafar, GivesMemoryBack) {
  CacheCase input({.head_dim = 128, .value_dim = 128, .dtype = DType::bf16, .tokens = 2100});
  const auto method = make_method("mustafar:key_sparsity=0.7,value_sparsity=0.7");
  const auto cache = method->new_cache(input.layer_shape(), {});
  input.run(*cache, *make_method("window:left=100"), 0, 2080, true);
  const std::size_t before = cache->memory_bytes();
  cache->finish_prefill({});
  // 47% of the compressed 2048 tokens, and pages of the window.
  EXPECT_LT(cache->memory_bytes(), before * 58 / 100);
  cache->reset();
  EXPECT_LT(cache->memory_bytes(), before / 10);
  EXPECT_EQ(cache->tokens(), 0);
}

TEST(Mustafar, TakesBackTokensThatAreStillWhole) {
  CacheCase input({.tokens = 400});
  const auto method = make_method("mustafar");
  const auto cache = method->new_cache(input.layer_shape(), {});
  input.run(*cache, *method, 0, 300, true);
  cache->finish_prefill({});
  input.expect_token_taken_back(*cache, *method, 300);
}

TEST(Mustafar, RefusesBadParameters) {
  EXPECT_THROW(make_method("mustafar:key_sparsity=1.5"), Error);
  EXPECT_THROW(make_method("mustafar:window=0"), Error);
}

}  // namespace
}  // namespace tessera
