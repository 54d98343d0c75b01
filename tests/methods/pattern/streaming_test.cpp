// streaming against the formula of its definition; the A-shape of minference is the same.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "methods/cache_case.h"
#include "methods/masks.h"

namespace tessera {
namespace {

using test::AttentionCase;
using test::CaseShape;
using test::masks_of;
using test::masks_where;
using test::position;

class StreamingShapes : public testing::TestWithParam<CaseShape> {};

TEST_P(StreamingShapes, IsSinksPlusWindowPlusDenseTail) {
  const AttentionCase input(GetParam());
  struct Sizes {
    int init, local, last;
  };
  for (const Sizes& size :
       {Sizes{4, 50, 0}, Sizes{0, 1, 0}, Sizes{150, 20, 0}, Sizes{10, 30, 9}, Sizes{3, 64, 140}, Sizes{200, 300, 1}}) {
    const auto expected = masks_where(input, [&](auto s, auto, auto n, auto j) {
      const std::int64_t p = position(input, s, n);
      if (!input.allowed(s, n, j)) return false;
      return j < size.init || std::abs(p - j) < size.local || n >= input.problem.q_len_of(s) - size.last;
    });
    const std::string spec = "streaming:n_init=" + std::to_string(size.init) +
                             ",n_local=" + std::to_string(size.local) + ",n_last=" + std::to_string(size.last);
    EXPECT_TRUE(masks_of(spec, input) == expected) << spec;
    if (!input.problem.causal || size.last > 0) continue;
    const std::string head =
        "minference:pattern=stream_llm,n_init=" + std::to_string(size.init) + ",n_local=" + std::to_string(size.local);
    EXPECT_TRUE(masks_of(head, input) == expected) << head;
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, StreamingShapes, testing::ValuesIn(test::all_shapes()),
                         [](const auto& shape) { return shape.param.name; });

TEST(Streaming, PlanOfTheTailIsProportionalToItsEntries) {
  // The tail cuts through one query tile only; the others need no bitmask.
  Problem problem;
  problem.q_len = problem.kv_len = 20000;
  problem.head_dim = problem.value_dim = 64;
  problem.causal = true;
  const Plan plan = make_method("streaming:n_init=4,n_local=512,n_last=100")->plan(problem, {}, {});
  EXPECT_LE(plan.mask_words.size(), 128U * (20000 / 64 + 1));
  EXPECT_LE(plan.entries.size(), 2U * static_cast<std::size_t>(plan.rows()));
}

TEST(Streaming, TheCacheHoldsSinksAndTheWindow) {
  for (const test::CacheCaseShape& shape : test::cache_shapes()) {
    for (const bool own_prompt : {false, true}) {
      test::CacheCase input(shape);
      const auto method = make_method("streaming:n_init=5,n_local=40");
      const auto cache = method->new_cache(input.layer_shape(own_prompt), {});
      ASSERT_NE(cache, nullptr);
      const auto sees = [](auto, auto token, auto j) { return j <= token && (j < 5 || token - j < 40); };
      for (const std::int64_t begin : {0, 90}) {
        input.expect_attention(input.run(*cache, *method, begin, 90, true), begin, sees);
      }
      EXPECT_EQ(cache->rows_kept(), 180 * shape.kv_heads) << "the prompt is whole until its end";
      cache->finish_prefill({});
      for (std::int64_t token = 180; token < 250; ++token) {
        EXPECT_EQ(cache->rows_kept(), 44 * shape.kv_heads);
        input.expect_attention(input.run(*cache, *method, token, 1, false), token, sees);
      }
      input.expect_attention(input.run(*cache, *method, 250, 20, true), 250, sees);
      EXPECT_EQ(cache->rows_kept(), 44 * shape.kv_heads) << "further prompts too";
    }
  }
  EXPECT_EQ(make_method("streaming:n_last=100")->new_cache(test::CacheCase({}).layer_shape(), {}), nullptr);
}

/// Rows [tokens][heads][dim] with pairs (i, i + dim / 2) turned by the position of their token.
void rotate(float* row, std::int64_t dim, double position) {
  for (std::int64_t i = 0; i < dim / 2; ++i) {
    const double angle = position * std::pow(100.0, -2.0 * static_cast<double>(i) / static_cast<double>(dim));
    const double low = row[i];
    const double high = row[i + dim / 2];
    row[i] = static_cast<float>(low * std::cos(angle) - high * std::sin(angle));
    row[i + dim / 2] = static_cast<float>(high * std::cos(angle) + low * std::sin(angle));
  }
}

/// A case whose queries and keys have positions rotated in, and what they were before.
class RotatedCase {
 public:
  explicit RotatedCase(const test::CacheCaseShape& shape) : raw(shape), rotated(shape) {
    for (std::int64_t token = 0; token < shape.tokens; ++token) {
      const auto position = static_cast<double>(token);
      for (std::int64_t h = 0; h < shape.q_heads; ++h) rotate(rotated.q(token, h), shape.head_dim, position);
      for (std::int64_t h = 0; h < shape.kv_heads; ++h) rotate(rotated.k(token, h), shape.head_dim, position);
    }
  }

  /// Attention of a token over these tokens, all at their place in the list, in float64.
  std::vector<double> by_slots(std::int64_t q_head, const std::vector<std::int64_t>& kept) {
    const test::CacheCaseShape& shape = raw.shape();
    const std::int64_t head = q_head / (shape.q_heads / shape.kv_heads);
    std::vector<float> q(raw.q(kept.back(), q_head), raw.q(kept.back(), q_head) + shape.head_dim);
    rotate(q.data(), shape.head_dim, static_cast<double>(kept.size() - 1));
    std::vector<double> out(static_cast<std::size_t>(shape.value_dim));
    double total = 0;
    for (std::size_t slot = 0; slot < kept.size(); ++slot) {
      std::vector<float> k(raw.k(kept[slot], head), raw.k(kept[slot], head) + shape.head_dim);
      rotate(k.data(), shape.head_dim, static_cast<double>(slot));
      double score = 0;
      for (std::size_t d = 0; d < k.size(); ++d) score += static_cast<double>(q[d]) * k[d];
      const double weight = std::exp(score / std::sqrt(static_cast<double>(shape.head_dim)));
      total += weight;
      for (std::size_t d = 0; d < out.size(); ++d) out[d] += weight * raw.v(kept[slot], head)[d];
    }
    for (double& x : out) x /= total;
    return out;
  }

  /// Outputs of tokens [first, first + count): row i sees kept[i].
  void expect_slots(const std::vector<float>& o, const std::vector<std::vector<std::int64_t>>& kept) {
    const test::CacheCaseShape& shape = raw.shape();
    for (std::size_t row = 0; row < kept.size(); ++row) {
      for (std::int64_t h = 0; h < shape.q_heads; ++h) {
        const auto expected = by_slots(h, kept[row]);
        for (std::int64_t d = 0; d < shape.value_dim; ++d) {
          const auto at = (static_cast<std::int64_t>(row) * shape.q_heads + h) * shape.value_dim + d;
          // Keys of 16 bits are rounded after their rotation, and sinks once more.
          ASSERT_NEAR(o[static_cast<std::size_t>(at)], expected[static_cast<std::size_t>(d)],
                      shape.dtype == DType::f32   ? 5e-5
                      : shape.dtype == DType::f16 ? 2e-2
                                                  : 1.5e-1)
              << "token " << kept[row].back() << ", head " << h;
        }
      }
    }
  }

  test::CacheCase raw;
  test::CacheCase rotated;
};

std::vector<std::int64_t> sinks_and(std::int64_t first, std::int64_t last, std::int64_t sinks) {
  std::vector<std::int64_t> kept;
  for (std::int64_t j = 0; j < sinks; ++j) kept.push_back(j);
  for (std::int64_t j = first; j <= last; ++j) kept.push_back(j);
  return kept;
}

TEST(Streaming, PositionsAreSlotsOfTheCache) {
  for (const std::int64_t sinks : {0, 5}) {
    for (const test::CacheCaseShape& shape : test::cache_shapes()) {
      RotatedCase input(shape);
      const auto method = make_method("streaming:n_local=40,positions=slot,n_init=" + std::to_string(sinks));
      LayerCacheShape layer = input.rotated.layer_shape();
      layer.rope_theta = 100;
      const auto cache = method->new_cache(layer, {});
      const auto dense = make_method("dense");
      // While nothing is dropped, slots are positions.
      auto o = input.rotated.run(*cache, *dense, 0, 20, true);
      cache->finish_prefill({});
      o = input.rotated.run(*cache, *method, 20, 1, false);
      input.expect_slots(o, {sinks_and(sinks, 20, sinks)});
      o = input.rotated.run(*cache, *dense, 21, 129, true);
      std::vector<std::vector<std::int64_t>> kept;
      // A pass longer than the window sees itself and the sinks.
      for (std::int64_t token = 21; token < 150; ++token) kept.push_back(sinks_and(21, token, sinks));
      input.expect_slots(o, kept);
      cache->finish_prefill({});
      for (std::int64_t token = 150; token < 230; ++token) {
        o = input.rotated.run(*cache, *method, token, 1, false);
        input.expect_slots(o, {sinks_and(token - 39, token, sinks)});
        EXPECT_EQ(cache->rows_kept(), (sinks + 40) * shape.kv_heads);
      }
      // Ten at once: the oldest make room for them first.
      o = input.rotated.run(*cache, *method, 230, 10, false);
      kept.clear();
      for (std::int64_t token = 230; token < 240; ++token) kept.push_back(sinks_and(200, token, sinks));
      input.expect_slots(o, kept);
      cache->reset();
      EXPECT_EQ(cache->memory_bytes(), 0U);
    }
  }
}

// The facts of the paper: what is kept and its order decide, not where it was; and the sinks' distance matters.
TEST(Streaming, SlotsForgetHowMuchWasDropped) {
  std::vector<std::vector<float>> results;
  for (const std::int64_t dropped : {0, 30, 200}) {
    for (const std::string positions : {"slot", "true"}) {
      // The same 4 sinks and 20 last tokens, after a different number of others.
      RotatedCase input({});
      test::CacheCase& c = input.rotated;
      const std::int64_t last = 23 + dropped;
      for (std::int64_t j = 4; j <= last; ++j) {
        const std::int64_t same = j - dropped >= 4 ? j - dropped : 350;  // of the tokens that differ
        for (std::int64_t h = 0; h < 2; ++h) {
          std::copy_n(input.raw.k(same, h), 16, c.k(j, h));
          rotate(c.k(j, h), 16, static_cast<double>(j));
          if (j != same) std::copy_n(input.raw.v(same, h), 12, c.v(j, h));
        }
        for (std::int64_t h = 0; h < 4; ++h) {
          std::copy_n(input.raw.q(same, h), 16, c.q(j, h));
          rotate(c.q(j, h), 16, static_cast<double>(j));
        }
      }
      const auto method = make_method("streaming:n_init=4,n_local=20,positions=" + positions);
      LayerCacheShape layer = c.layer_shape();
      layer.rope_theta = 100;
      const auto cache = method->new_cache(layer, {});
      c.run(*cache, *make_method("dense"), 0, last, true);
      cache->finish_prefill({});
      results.push_back(c.run(*cache, *method, last, 1, false));
    }
  }
  const auto distance = [&](std::size_t a, std::size_t b) {
    double most = 0;
    for (std::size_t i = 0; i < results[a].size(); ++i) {
      most = std::max(most, std::abs(static_cast<double>(results[a][i]) - results[b][i]));
    }
    return most;
  };
  EXPECT_LT(distance(0, 1), 1e-5) << "nothing dropped";
  EXPECT_LT(distance(0, 2), 1e-4);
  EXPECT_LT(distance(0, 4), 1e-4);
  EXPECT_GT(distance(0, 3), 1e-2) << "true positions remember it";
}

TEST(Streaming, SlotsNeedTheRotation) {
  const test::CacheCase input({});
  EXPECT_THROW(make_method("streaming:positions=slot")->new_cache(input.layer_shape(), {}), Error);
  EXPECT_THROW(make_method("streaming:positions=slot,n_last=3")->new_cache(input.layer_shape(), {}), Error);
  EXPECT_THROW(make_method("streaming:positions=cache"), Error);
}

TEST(Streaming, NeedsNoTensors) {
  Problem problem;
  problem.q_len = problem.kv_len = 1000;
  problem.head_dim = problem.value_dim = 64;
  problem.causal = true;
  EXPECT_NO_THROW(validate(make_method("streaming")->plan(problem, {}, {})));
}

}  // namespace
}  // namespace tessera
