// think: which channels go, what decoding then sees, and what memory is left.
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "methods/cache_case.h"

namespace tessera {
namespace {

using test::CacheCase;
using test::CacheCaseShape;

struct Rule {
  double ratio = 0.4;
  std::int64_t window = 8;
  std::int64_t recent = 20;
  std::string spec() const {
    return "think:ratio=" + std::to_string(ratio) + ",window=" + std::to_string(window) +
           ",recent=" + std::to_string(recent);
  }
};

/// Channels that a kv head keeps, by the Frobenius norm of each channel's share of the window's scores.
std::vector<std::int64_t> kept_by_definition(CacheCase& input, const Rule& rule, std::int64_t prompt,
                                             std::int64_t head) {
  const CacheCaseShape& shape = input.shape();
  const std::int64_t group = shape.q_heads / shape.kv_heads;
  std::vector<double> norm(static_cast<std::size_t>(shape.head_dim), 0.0);
  for (std::int64_t d = 0; d < shape.head_dim; ++d) {
    for (std::int64_t g = 0; g < group; ++g) {
      for (std::int64_t t = prompt - rule.window; t < prompt; ++t) {
        for (std::int64_t j = 0; j < prompt; ++j) {
          const double share = static_cast<double>(input.q(t, head * group + g)[d]) * input.k(j, head)[d];
          norm[static_cast<std::size_t>(d)] += share * share;
        }
      }
    }
  }
  std::vector<std::int64_t> order(norm.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) {
    return norm[static_cast<std::size_t>(a)] > norm[static_cast<std::size_t>(b)];
  });
  order.resize(order.size() - static_cast<std::size_t>(rule.ratio * static_cast<double>(shape.head_dim)));
  return order;
}

/// Attention of tokens from `first` on whose keys below `pruned` have only the kept channels.
void expect_output(CacheCase& input, const std::vector<float>& o, std::int64_t first, std::int64_t pruned,
                   const std::vector<std::vector<std::int64_t>>& kept) {
  const auto key = [&](std::int64_t head, std::int64_t j) {
    std::vector<double> whole = input.exact_key()(head, j);
    if (j >= pruned) return whole;
    std::vector<double> narrow(whole.size(), 0.0);
    for (const std::int64_t d : kept[static_cast<std::size_t>(head)]) {
      narrow[static_cast<std::size_t>(d)] = whole[static_cast<std::size_t>(d)];
    }
    return narrow;
  };
  input.expect_attention_to(o, first, key, input.exact_value(), 3e-5);
}

TEST(ThinK, DecodesOverTheChannelsThatTheWindowLeaves) {
  for (const CacheCaseShape& shape : test::cache_shapes()) {
    for (const Rule& rule : {Rule{}, Rule{0.7, 3, 0}, Rule{0.5, 32, 100}}) {
      CacheCase input(shape);
      const auto method = make_method(rule.spec());
      const auto cache = method->new_cache(input.layer_shape(), {});
      constexpr std::int64_t prompt = 230;
      // In chunks: the window reaches over the last of them.
      std::vector<float> o = input.run(*cache, *make_method("dense"), 0, 225, true);
      input.expect_attention(o, 0, [](auto, auto, auto) { return true; });
      input.run(*cache, *make_method("dense"), 225, prompt - 225, true);
      cache->finish_prefill({});
      std::vector<std::vector<std::int64_t>> kept;
      for (std::int64_t head = 0; head < shape.kv_heads; ++head) {
        kept.push_back(kept_by_definition(input, rule, prompt, head));
      }
      for (std::int64_t token = prompt; token < prompt + 6; ++token) {
        o = input.run(*cache, *method, token, 1, false);
        expect_output(input, o, token, prompt - rule.recent, kept);
      }
      // Several rows at once, and a further prompt: the mask stays.
      o = input.run(*cache, *method, prompt + 6, 40, true);
      cache->finish_prefill({});
      expect_output(input, o, prompt + 6, prompt - rule.recent, kept);
      o = input.run(*cache, *method, prompt + 46, 1, false);
      expect_output(input, o, prompt + 46, prompt - rule.recent, kept);
    }
  }
}

TEST(ThinK, RatioZeroIsDense) {
  CacheCase input({});
  const auto method = make_method("think:ratio=0");
  const auto cache = method->new_cache(input.layer_shape(), {});
  input.run(*cache, *method, 0, 200, true);
  cache->finish_prefill({});
  const auto o = input.run(*cache, *method, 200, 1, false);
  input.expect_attention(o, 200, [](auto, auto, auto) { return true; });
}

TEST(ThinK, ChannelsThatAddNothingGoFirst) {
  CacheCase input({.head_dim = 20});
  for (std::int64_t token = 0; token < 400; ++token) {
    for (std::int64_t head = 0; head < 2; ++head) {
      for (const std::int64_t d : {0, 7, 19}) input.k(token, head)[d] = 0;
    }
    for (std::int64_t head = 0; head < 4; ++head) {
      for (const std::int64_t d : {3, 4, 11, 12, 15}) input.q(token, head)[d] = 0;
    }
  }
  const auto method = make_method("think:ratio=0.4,recent=10");
  const auto cache = method->new_cache(input.layer_shape(), {});
  input.run(*cache, *method, 0, 300, true);
  cache->finish_prefill({});
  const auto o = input.run(*cache, *method, 300, 1, false);
  input.expect_attention(o, 300, [](auto, auto, auto) { return true; });
}

TEST(ThinK, GivesMemoryBack) {
  CacheCase input({.head_dim = 64, .value_dim = 64});
  const auto method = make_method("think:ratio=0.5,recent=16,window=8");
  const auto cache = method->new_cache(input.layer_shape(), {});
  input.run(*cache, *method, 0, 384, true);
  const std::size_t before = cache->memory_bytes();
  cache->finish_prefill({});
  EXPECT_EQ(cache->rows_kept(), 2 * 384);
  // Half of the keys are a quarter of all; pages are whole.
  EXPECT_LT(cache->memory_bytes(), before * 4 / 5);
  cache->reset();
  EXPECT_EQ(cache->tokens(), 0);
  EXPECT_LT(cache->memory_bytes(), before / 10);
}

TEST(ThinK, TakesBackTokensAfterThePrompt) {
  CacheCase input({});
  const auto method = make_method("think:recent=8");
  const auto cache = method->new_cache(input.layer_shape(), {});
  input.run(*cache, *method, 0, 100, true);
  cache->finish_prefill({});
  input.expect_token_taken_back(*cache, *method, 100);
}

TEST(ThinK, RefusesBadParameters) {
  EXPECT_THROW(make_method("think:ratio=1"), Error);
  EXPECT_THROW(make_method("think:window=0"), Error);
  EXPECT_THROW(make_method("think:recent=-1"), Error);
}

}  // namespace
}  // namespace tessera
