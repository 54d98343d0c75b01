// zipcache: which tokens are salient, how each class is quantised and when, what decoding then sees, what memory is
// left.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "methods/cache_case.h"

namespace tessera {
namespace {

using test::CacheCase;
using test::CacheCaseShape;

struct Rule {
  double unimportant = 0.4;
  int important_bits = 4;
  int unimportant_bits = 2;
  std::int64_t interval = 10;
  double recent = 0.1;
  double random = 0;
  std::string spec() const {
    return "zipcache:unimportant=" + std::to_string(unimportant) + ",important_bits=" + std::to_string(important_bits) +
           ",unimportant_bits=" + std::to_string(unimportant_bits) + ",interval=" + std::to_string(interval) +
           ",recent_probes=" + std::to_string(recent) + ",random_probes=" + std::to_string(random);
  }
};

/// What the cache should hold, in float64: rows as they are read back, exact until they are quantised.
class Model {
 public:
  Model(CacheCase& input, const Rule& rule) : input_(input), rule_(rule), shape_(input.shape()) {
    for (std::int64_t head = 0; head < shape_.kv_heads; ++head) {
      keys_.emplace_back();
      values_.emplace_back();
      for (std::int64_t j = 0; j < shape_.tokens; ++j) {
        keys_.back().push_back(input.exact_key()(head, j));
        values_.back().push_back(input.exact_value()(head, j));
      }
    }
  }

  void expect(const std::vector<float>& o, std::int64_t first) {
    input_.expect_attention_to(
        o, first, [&](std::int64_t head, std::int64_t j) { return keys_[head][j]; },
        [&](std::int64_t head, std::int64_t j) { return values_[head][j]; }, 1e-3);
  }

  /// Quantises tokens [first, last), judged by the queries of `probes`.
  void quantise(std::int64_t first, std::int64_t last, const std::vector<std::int64_t>& probes) {
    std::vector<std::vector<std::int64_t>> important, unimportant;
    const auto low = static_cast<std::int64_t>(rule_.unimportant * static_cast<double>(last - first));
    for (std::int64_t head = 0; head < shape_.kv_heads; ++head) {
      const auto order = by_saliency(head, first, last, probes, true);
      important.emplace_back(order.begin(), order.end() - low);
      unimportant.emplace_back(order.end() - low, order.end());
      std::sort(important.back().begin(), important.back().end());
      std::sort(unimportant.back().begin(), unimportant.back().end());
    }
    std::vector<std::vector<double>> factors;
    for (std::int64_t head = 0; head < shape_.kv_heads; ++head) {
      factors.emplace_back(static_cast<std::size_t>(shape_.value_dim), 0.0);
      for (std::int64_t j = first; j < last; ++j) {
        for (std::size_t d = 0; d < factors.back().size(); ++d) {
          factors.back()[d] = std::max(factors.back()[d], std::fabs(values_[head][j][d]));
        }
      }
      for (double& factor : factors.back()) factor = std::sqrt(factor);
    }
    quantise_class(important, factors, rule_.important_bits);
    quantise_class(unimportant, factors, rule_.unimportant_bits);
    important_ = important;
  }

  /// Tokens from the most to the least salient.
  std::vector<std::int64_t> by_saliency(std::int64_t head, std::int64_t first, std::int64_t last,
                                        const std::vector<std::int64_t>& probes, bool divided) {
    const std::int64_t group = shape_.q_heads / shape_.kv_heads;
    std::vector<double> saliency(static_cast<std::size_t>(last), 0.0);
    for (const std::int64_t probe : probes) {
      for (std::int64_t q_head = head * group; q_head < (head + 1) * group; ++q_head) {
        std::vector<double> p;
        double sum = 0;
        for (std::int64_t j = 0; j <= probe; ++j) {
          double score = 0;
          for (std::int64_t d = 0; d < shape_.head_dim; ++d) {
            score += double{input_.q(probe, q_head)[d]} * keys_[head][j][static_cast<std::size_t>(d)];
          }
          p.push_back(std::exp(score / std::sqrt(static_cast<double>(shape_.head_dim))));
          sum += p.back();
        }
        for (std::int64_t j = first; j <= std::min(probe, last - 1); ++j) saliency[j] += p[j] / sum;
      }
    }
    for (std::int64_t j = first; divided && j < last; ++j) {
      saliency[j] /= static_cast<double>(std::count_if(probes.begin(), probes.end(), [&](auto p) { return p >= j; }));
    }
    std::vector<std::int64_t> order(static_cast<std::size_t>(last - first));
    std::iota(order.begin(), order.end(), first);
    std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return saliency[a] > saliency[b]; });
    return order;
  }

  /// Of the last quantise(), per kv head, ascending.
  const std::vector<std::vector<std::int64_t>>& important() const { return important_; }

 private:
  /// Codes are found in floats: among numbers of 16 bits, halves between two codes are common.
  struct Range {
    float low = std::numeric_limits<float>::infinity();
    float high = -std::numeric_limits<float>::infinity();
    void add(float x) {
      low = std::min(low, x);
      high = std::max(high, x);
    }
    double read_back(float x, int bits) const {
      const auto levels = static_cast<float>((1 << bits) - 1);
      const float step = high == low ? 0 : high / levels - low / levels;
      return step == 0 ? low : std::floor((x - low) / step + 0.5F) * double{step} + low;
    }
  };

  void quantise_class(const std::vector<std::vector<std::int64_t>>& tokens,
                      const std::vector<std::vector<double>>& factors, int bits) {
    if (bits == 16) return;  // kept as they are
    for (std::size_t head = 0; head < keys_.size(); ++head) {
      for (std::size_t d = 0; d < static_cast<std::size_t>(shape_.head_dim); ++d) {
        Range range;
        for (const std::int64_t j : tokens[head]) range.add(static_cast<float>(keys_[head][j][d]));
        for (const std::int64_t j : tokens[head])
          keys_[head][j][d] = range.read_back(static_cast<float>(keys_[head][j][d]), bits);
      }
    }
    for (std::size_t i = 0; i < tokens[0].size(); ++i) {
      Range range;
      const auto each = [&](const auto& body) {
        for (std::size_t head = 0; head < values_.size(); ++head) {
          for (std::size_t d = 0; d < static_cast<std::size_t>(shape_.value_dim); ++d) {
            body(values_[head][tokens[head][i]][d], factors[head][d]);
          }
        }
      };
      each([&](double& x, double factor) { range.add(static_cast<float>(x) / static_cast<float>(factor)); });
      each([&](double& x, double factor) {
        x = range.read_back(static_cast<float>(x) / static_cast<float>(factor), bits) * factor;
      });
    }
  }

  CacheCase& input_;
  Rule rule_;
  CacheCaseShape shape_;
  std::vector<std::vector<std::vector<double>>> keys_, values_;  ///< [kv_heads][tokens][dim]
  std::vector<std::vector<std::int64_t>> important_;
};

/// The last share of tokens [first, last).
std::vector<std::int64_t> recent(std::int64_t first, std::int64_t last, double share) {
  const auto count = static_cast<std::int64_t>(std::ceil(share * static_cast<double>(last - first)));
  std::vector<std::int64_t> probes(static_cast<std::size_t>(std::max<std::int64_t>(1, count)));
  std::iota(probes.begin(), probes.end(), last - std::ssize(probes));
  return probes;
}

TEST(ZipCache, DecodesOverTwoPrecisionsAndAWholeTail) {
  for (const CacheCaseShape& shape : test::cache_shapes()) {
    for (const Rule& rule : {Rule{}, Rule{0.25, 8, 3, 7, 0.5}, Rule{0, 4, 2, 100, 0}, Rule{1, 4, 2, 1, 0.05},
                             Rule{0.4, 16, 2, 10, 0.1}, Rule{0.6, 4, 16, 9, 0.1}}) {
      CacheCase input(shape);
      Model model(input, rule);
      const auto method = make_method(rule.spec());
      const auto cache = method->new_cache(input.layer_shape(), {});
      // A prompt in chunks, by dense attention or another method.
      constexpr std::int64_t prompt = 133;
      const auto prefill = make_method(rule.interval == 7 ? "window:left=30" : "dense");
      std::vector<float> o = input.run(*cache, *prefill, 0, 70, true);
      if (rule.interval != 7) model.expect(o, 0);
      input.run(*cache, *prefill, 70, prompt - 70, true);
      cache->finish_prefill({});
      model.quantise(0, prompt, recent(0, prompt, rule.recent));
      std::int64_t whole = prompt;  // the first token that is whole
      std::int64_t token = prompt;
      const auto decode = [&](std::int64_t count) {
        for (const std::int64_t end = token + count; token < end; ++token) {
          model.expect(input.run(*cache, *method, token, 1, false), token);
          if (token + 1 - whole < rule.interval) continue;
          model.quantise(whole, token + 1, {token});
          whole = token + 1;
        }
      };
      decode(25);
      // A further prompt, judged by its own queries over all that is there.
      o = input.run(*cache, *method, token, 40, true);
      model.expect(o, token);
      cache->finish_prefill({});
      model.quantise(whole, token + 40, recent(token, token + 40, rule.recent));
      token += 40;
      whole = token;
      decode(12);
      EXPECT_EQ(cache->tokens(), token);
      EXPECT_EQ(cache->rows_kept(), token * shape.kv_heads);
    }
  }
}

// What the outputs above depend on: without the division other tokens would be salient.
TEST(ZipCache, TheDivisionChangesTheChoice) {
  CacheCase input({});
  const Rule rule{0.5, 4, 2, 10, 0.5};
  Model model(input, rule);
  const auto probes = recent(0, 200, 0.5);
  // Among the tokens that all probes see nothing changes; those that few see are no longer at a disadvantage.
  const auto late = [&](bool divided) {
    const auto order = model.by_saliency(0, 0, 200, probes, divided);
    return std::count_if(order.begin(), order.begin() + 100, [](std::int64_t j) { return j >= 150; });
  };
  EXPECT_GE(late(true), 15);
  EXPECT_LE(late(false), 10);
}

TEST(ZipCache, RandomProbesJudgeWhatTheEndDoesNotSee) {
  CacheCase input({.q_heads = 2, .kv_heads = 2, .head_dim = 16, .value_dim = 16});
  // All queries but the last look at tokens 20 to 29; the last ones look at tokens 40 to 49.
  for (std::int64_t token = 0; token < 400; ++token) {
    for (std::int64_t head = 0; head < 2; ++head) {
      for (std::int64_t d = 0; d < 16; ++d) input.q(token, head)[d] = 0;
      input.q(token, head)[token < 240 ? 0 : 1] = 10;
      input.set_k(token, head, [&](std::int64_t d) {
        return (d == 0 && token >= 20 && token < 30) || (d == 1 && token >= 40 && token < 50) ? 8.0F : 0.0F;
      });
    }
    input.q(300, 0)[0] = input.q(300, 1)[0] = 10;  // decoding looks at the first ones
    input.q(300, 0)[1] = input.q(300, 1)[1] = 0;
  }
  // The values of the looked-at tokens come back well only from the class of 8 bits.
  const auto error = [&](double random) {
    const Rule rule{0.9, 8, 2, 100, 0.05, random};
    const auto method = make_method(rule.spec());
    const auto cache = method->new_cache(input.layer_shape(), {});
    input.run(*cache, *make_method("dense"), 0, 300, true);
    cache->finish_prefill({});
    const auto o = input.run(*cache, *method, 300, 1, false);
    double worst = 0;
    for (std::int64_t head = 0; head < 2; ++head) {
      const auto p = input.probabilities(300, head, [](std::int64_t) { return true; });
      for (std::int64_t d = 0; d < 16; ++d) {
        double expected = 0;
        for (std::int64_t j = 0; j <= 300; ++j) expected += p[static_cast<std::size_t>(j)] * input.v(j, head)[d];
        worst = std::max(worst, std::fabs(o[static_cast<std::size_t>(head * 16 + d)] - expected));
      }
    }
    return worst;
  };
  EXPECT_LT(error(0.05), 0.02);
  EXPECT_GT(error(0), 0.05);
}

TEST(ZipCache, ChunksAndThreadsDoNotMatter) {
  CacheCase input({.dtype = DType::bf16});
  const auto method = make_method("zipcache:interval=8");
  std::vector<std::vector<float>> results;
  for (const std::vector<std::int64_t>& chunks : {std::vector<std::int64_t>{300}, {1, 7, 100, 192}, {299, 1}}) {
    for (const int threads : {1, 3}) {
      PlanContext context;
      context.run.threads = threads;
      const auto cache = method->new_cache(input.layer_shape(), context);
      std::int64_t token = 0;
      for (const std::int64_t chunk : chunks) {
        input.run(*cache, *method, token, chunk, true, context);
        token += chunk;
      }
      cache->finish_prefill(context);
      std::vector<float> all;
      for (; token < 320; ++token) {
        const auto o = input.run(*cache, *method, token, 1, false, context);
        all.insert(all.end(), o.begin(), o.end());
      }
      results.push_back(all);
    }
  }
  for (const auto& result : results) EXPECT_EQ(result, results[0]);
}

TEST(ZipCache, ConstantTokensComeBackExactly) {
  CacheCase input({});
  for (std::int64_t token = 0; token < 400; ++token) {
    for (std::int64_t head = 0; head < 2; ++head) {
      input.set_k(token, head, [](std::int64_t d) { return 0.25F * static_cast<float>(d); });
      for (std::int64_t d = 0; d < 12; ++d) input.v(token, head)[d] = -2.5F;
    }
  }
  const auto method = make_method("zipcache");
  const auto cache = method->new_cache(input.layer_shape(), {});
  input.run(*cache, *method, 0, 200, true);
  cache->finish_prefill({});
  for (const float x : input.run(*cache, *method, 200, 1, false)) EXPECT_NEAR(x, -2.5, 1e-5);
}

TEST(ZipCache, SixteenBitsAreExact) {
  for (const CacheCaseShape& shape : test::cache_shapes()) {
    CacheCase input(shape);
    const auto method = make_method(Rule{0.4, 16, 16, 10, 0.1}.spec());
    const auto cache = method->new_cache(input.layer_shape(), {});
    const auto all = [](auto, auto token, auto j) { return j <= token; };
    input.run(*cache, *method, 0, 133, true);
    cache->finish_prefill({});
    for (std::int64_t token = 133; token < 160; ++token) {
      input.expect_attention(input.run(*cache, *method, token, 1, false), token, all);
    }
    input.expect_attention(input.run(*cache, *method, 160, 40, true), 160, all);
    cache->reset();
    EXPECT_EQ(cache->memory_bytes(), 0U);
    input.expect_attention(input.run(*cache, *method, 0, 50, true), 0, all);
  }
}

TEST(ZipCache, TheFirstTokensCanBeDecoded) {
  CacheCase input({});
  const Rule rule{};
  Model model(input, rule);
  const auto method = make_method(rule.spec());
  const auto cache = method->new_cache(input.layer_shape(), {});
  for (std::int64_t token = 0; token < 25; ++token) {
    model.expect(input.run(*cache, *method, token, 1, false), token);
    if (token % 10 == 9) model.quantise(token - 9, token + 1, {token});
  }
}

TEST(ZipCache, GivesMemoryBack) {
  CacheCase input({.q_heads = 2, .head_dim = 128, .value_dim = 128, .dtype = DType::bf16, .tokens = 2200});
  const auto method = make_method("zipcache");
  const auto cache = method->new_cache(input.layer_shape(), {});
  input.run(*cache, *make_method("window:left=100"), 0, 2000, true);
  const auto dense = static_cast<std::size_t>(2000 * 2 * 256 * 2);
  // Probes are held beside the rows while the prompt comes in.
  EXPECT_GT(cache->memory_bytes(), dense);
  cache->finish_prefill({});
  // 0.6 * 4 + 0.4 * 2 bits of 16, two floats per token, five per channel.
  EXPECT_LT(cache->memory_bytes(), dense * 22 / 100);
  for (std::int64_t token = 2000; token < 2200; ++token) input.run(*cache, *method, token, 1, false);
  EXPECT_LT(cache->memory_bytes(), dense * 11 / 10 * 24 / 100);
  cache->reset();
  EXPECT_LT(cache->memory_bytes(), dense / 50);
  EXPECT_EQ(cache->tokens(), 0);

  const auto half = make_method("zipcache:important_bits=16,unimportant=0.75");
  const auto exact = half->new_cache(input.layer_shape(), {});
  input.run(*exact, *make_method("window:left=100"), 0, 2000, true);
  exact->finish_prefill({});
  // A quarter of the rows as they are, the others in 2 of 16 bits.
  EXPECT_GT(exact->memory_bytes(), dense * 25 / 100);
  EXPECT_LT(exact->memory_bytes(), dense * 38 / 100);
}

TEST(ZipCache, TakesBackTokensThatAreStillWhole) {
  CacheCase input({});
  const auto method = make_method("zipcache:interval=10");
  const auto cache = method->new_cache(input.layer_shape(), {});
  input.run(*cache, *method, 0, 100, true);
  // A pass of the prompt that failed leaves no trace in what judges it.
  input.run(*cache, *method, 100, 60, true);
  EXPECT_TRUE(cache->truncate(100));
  cache->finish_prefill({});
  const auto first = input.expect_token_taken_back(*cache, *method, 100);
  const auto direct = method->new_cache(input.layer_shape(), {});
  input.run(*direct, *method, 0, 100, true);
  direct->finish_prefill({});
  EXPECT_EQ(input.run(*direct, *method, 100, 1, false), first);
  cache->reset();
  input.run(*cache, *method, 0, 100, true);
  cache->finish_prefill({});
  EXPECT_EQ(input.run(*cache, *method, 100, 1, false), first);
}

TEST(ZipCache, RefusesBadParameters) {
  EXPECT_THROW(make_method("zipcache:important_bits=5"), Error);
  EXPECT_THROW(make_method("zipcache:unimportant_bits=1"), Error);
  EXPECT_THROW(make_method("zipcache:unimportant=1.5"), Error);
  EXPECT_THROW(make_method("zipcache:important_bits=12"), Error);
  EXPECT_THROW(make_method("zipcache:interval=0"), Error);
  EXPECT_THROW(make_method("zipcache:recent_probes=0.6,random_probes=0.6"), Error);
}

}  // namespace
}  // namespace tessera
