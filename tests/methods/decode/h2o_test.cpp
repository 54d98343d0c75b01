// h2o: scores and evictions, step by step, against a float64 account of the paper.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>

#include "methods/cache_case.h"

namespace tessera {
namespace {

using test::CacheCase;
using test::CacheCaseShape;

/// One kv head: its kept tokens and their scores.
struct Account {
  std::vector<double> scores;
  std::set<std::int64_t> kept;
};

/// The whole method for one sequence, plainly.
class Definition {
 public:
  explicit Definition(CacheCase& input) : input_(input), heads_(static_cast<std::size_t>(input.shape().kv_heads)) {}

  bool keeps(std::int64_t head, std::int64_t j) const {
    return heads_[static_cast<std::size_t>(head)].kept.contains(j);
  }
  const std::vector<Account>& heads() const { return heads_; }

  /// Tokens [first, end) attend to what is kept and to each other, causally, and add their probabilities.
  void observe(std::int64_t first, std::int64_t end) {
    const std::int64_t group = input_.shape().q_heads / input_.shape().kv_heads;
    for (std::int64_t head = 0; head < std::ssize(heads_); ++head) {
      Account& own = heads_[static_cast<std::size_t>(head)];
      own.scores.resize(static_cast<std::size_t>(end));
      for (std::int64_t token = first; token < end; ++token) {
        own.kept.insert(token);
        for (std::int64_t g = 0; g < group; ++g) {
          const auto p = input_.probabilities(token, head * group + g, [&](auto j) { return own.kept.contains(j); });
          for (std::size_t j = 0; j < p.size(); ++j) own.scores[j] += p[j];
        }
      }
    }
  }
  void evict(std::int64_t heavy, std::int64_t recent) {
    for (Account& own : heads_) {
      std::vector<std::int64_t> order(own.kept.begin(), own.kept.end());
      const std::int64_t others = std::max<std::int64_t>(0, std::ssize(order) - recent);
      std::stable_sort(order.begin(), order.begin() + others,
                       [&](auto a, auto b) { return own.scores[a] > own.scores[b]; });
      for (std::int64_t i = heavy; i < others; ++i) own.kept.erase(order[static_cast<std::size_t>(i)]);
    }
  }

 private:
  CacheCase& input_;
  std::vector<Account> heads_;
};

/// Prefills and decodes; compares outputs, sizes and the greedy property at every step.
void expect_method(CacheCase& input, const std::string& spec, std::int64_t prompt, std::int64_t chunk,
                   std::int64_t heavy, std::int64_t recent, std::int64_t steps, int threads = 0,
                   bool own_prompt = true) {
  SCOPED_TRACE(spec + ", prompt " + std::to_string(prompt) + ", chunk " + std::to_string(chunk));
  PlanContext context;
  context.run.threads = threads;
  const auto method = make_method(spec);
  const auto cache = method->new_cache(input.layer_shape(own_prompt), {});
  ASSERT_NE(cache, nullptr);
  Definition definition(input);
  for (std::int64_t begin = 0; begin < prompt; begin += chunk) {
    const std::int64_t count = std::min(chunk, prompt - begin);
    const auto o = input.run(*cache, *method, begin, count, true, context);
    input.expect_attention(o, begin, [](auto, auto token, auto j) { return j <= token; });
  }
  definition.observe(0, prompt);
  const std::size_t whole = cache->memory_bytes();
  cache->finish_prefill(context);
  definition.evict(heavy, recent);
  const std::int64_t budget = heavy + recent;
  const std::int64_t heads = input.shape().kv_heads;
  EXPECT_EQ(cache->rows_kept(), heads * std::min(budget, prompt));
  if (prompt > 100 && budget < prompt / 2) {
    EXPECT_LT(cache->memory_bytes(), whole);
  }
  for (std::int64_t token = prompt; token < prompt + steps; ++token) {
    const std::vector<Account> before = definition.heads();
    const auto o = input.run(*cache, *method, token, 1, false, context);
    definition.observe(token, token + 1);
    input.expect_attention(o, token, [&](auto head, auto, auto j) { return definition.keeps(head, j); });
    definition.evict(heavy, recent);
    EXPECT_EQ(cache->rows_kept(), heads * std::min(budget, token + 1));
    for (std::size_t head = 0; head < before.size(); ++head) {
      for (const std::int64_t j : definition.heads()[head].kept) {
        EXPECT_TRUE(j == token || before[head].kept.contains(j));
      }
      for (std::int64_t j = token; j > token - recent; --j) EXPECT_TRUE(definition.heads()[head].kept.contains(j));
    }
  }
}

TEST(H2O, KeepsHeavyHittersAndRecentTokens) {
  for (const CacheCaseShape& shape : test::cache_shapes()) {
    CacheCase input(shape);
    expect_method(input, "h2o", 300, 300, 30, 30, 60);
    expect_method(input, "h2o:heavy=20,recent=7", 150, 150, 20, 7, 60);
  }
}

TEST(H2O, BudgetsAreFloorsOfThePromptOrAbsolute) {
  CacheCase input({});
  expect_method(input, "h2o:heavy_ratio=0.25,recent_ratio=0.05", 199, 199, 49, 9, 20);
  expect_method(input, "h2o:heavy=5", 199, 199, 5, 19, 20);
  expect_method(input, "h2o:heavy=0,recent=4", 60, 60, 0, 4, 20);
  expect_method(input, "h2o:heavy=3,recent=0", 60, 60, 3, 1, 20);
  expect_method(input, "h2o", 5, 5, 0, 1, 20);
}

TEST(H2O, AWholeBudgetIsDense) {
  CacheCase input({});
  expect_method(input, "h2o:heavy=400,recent=10", 100, 100, 400, 10, 30);
}

TEST(H2O, ChunksAndThreadsChangeNothing) {
  CacheCase input({});
  for (const std::int64_t chunk : {131, 50, 1}) {
    for (const int threads : {1, 2, 5}) expect_method(input, "h2o", 260, chunk, 26, 26, 10, threads);
  }
}

TEST(H2O, ScoresOfThePromptAreDenseWhateverMethodRunsIt) {
  // Two passes, when the method of the prompt leaves no log-sum-exp of dense attention.
  CacheCase input({});
  for (const std::int64_t chunk : {260, 77}) expect_method(input, "h2o", 260, chunk, 26, 26, 10, 0, false);
}

TEST(H2O, EarlyEvictionsAreNotUndoneLater) {
  // A token that nobody attends to is evicted; a later query that would love it does not get it back.
  CacheCase input({.q_heads = 1, .kv_heads = 1});
  for (std::int64_t token = 0; token < 130; ++token) input.q(token, 0)[0] = -8;
  input.set_k(10, 0, [](auto d) { return d == 0 ? 12.0F : 0.0F; });
  input.q(130, 0)[0] = 20;
  const auto method = make_method("h2o:heavy=10,recent=10");
  const auto cache = method->new_cache(input.layer_shape(), {});
  input.run(*cache, *method, 0, 120, true);
  cache->finish_prefill({});
  for (std::int64_t token = 120; token < 130; ++token) input.run(*cache, *method, token, 1, false);
  const auto o = input.run(*cache, *method, 130, 1, false);
  double largest = 0;
  for (std::int64_t d = 0; d < input.shape().value_dim; ++d) {
    largest = std::max(largest, std::abs(static_cast<double>(o[static_cast<std::size_t>(d)]) -
                                         static_cast<double>(input.v(10, 0)[d])));
  }
  EXPECT_GT(largest, 0.1);
}

TEST(H2O, FurtherPromptsCountOnAndSetTheBudgetAnew) {
  CacheCase input({});
  const auto method = make_method("h2o");
  const auto cache = method->new_cache(input.layer_shape(), {});
  Definition definition(input);
  input.run(*cache, *method, 0, 200, true);
  definition.observe(0, 200);
  cache->finish_prefill({});
  definition.evict(20, 20);
  for (std::int64_t token = 200; token < 215; ++token) {
    input.run(*cache, *method, token, 1, false);
    definition.observe(token, token + 1);
    definition.evict(20, 20);
  }
  const auto o = input.run(*cache, *method, 215, 135, true);
  definition.observe(215, 350);
  input.expect_attention(o, 215,
                         [&](auto head, auto token, auto j) { return j <= token && definition.keeps(head, j); });
  cache->finish_prefill({});
  definition.evict(35, 35);
  EXPECT_EQ(cache->rows_kept(), 2 * 70);
  const auto next = input.run(*cache, *method, 350, 1, false);
  definition.observe(350, 351);
  input.expect_attention(next, 350, [&](auto head, auto, auto j) { return definition.keeps(head, j); });
}

TEST(H2O, FailedPassesLeaveNothingBehind) {
  CacheCase input({});
  const auto method = make_method("h2o:heavy=20,recent=10");
  const auto cache = method->new_cache(input.layer_shape(), {});
  Definition definition(input);
  input.run(*cache, *method, 0, 100, true);
  input.run(*cache, *method, 100, 80, true);
  EXPECT_TRUE(cache->truncate(100));
  input.run(*cache, *method, 100, 20, true);
  definition.observe(0, 120);
  cache->finish_prefill({});
  definition.evict(20, 10);
  for (std::int64_t token = 120; token < 130; ++token) {
    const auto o = input.run(*cache, *method, token, 1, false);
    definition.observe(token, token + 1);
    input.expect_attention(o, token, [&](auto head, auto, auto j) { return definition.keeps(head, j); });
    definition.evict(20, 10);
  }
  EXPECT_FALSE(cache->truncate(125)) << "evicted since";
  cache->reset();
  EXPECT_EQ(cache->memory_bytes(), 0U);
  EXPECT_EQ(cache->tokens(), 0);
}

TEST(H2O, MemoryIsConstantWhileDecoding) {
  CacheCase input({});
  const auto method = make_method("h2o:heavy=20,recent=10");
  const auto cache = method->new_cache(input.layer_shape(), {});
  input.run(*cache, *method, 0, 100, true);
  cache->finish_prefill({});
  for (std::int64_t token = 100; token < 120; ++token) input.run(*cache, *method, token, 1, false);
  const std::size_t settled = cache->memory_bytes();
  for (std::int64_t token = 120; token < 400; ++token) input.run(*cache, *method, token, 1, false);
  EXPECT_EQ(cache->memory_bytes(), settled);
}

}  // namespace
}  // namespace tessera
