// snapkv: votes, pooling and eviction against a float64 account of the paper; what decoding then sees; memory.
#include <gmock/gmock.h>
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

struct Rule {
  std::int64_t capacity = 60;
  std::int64_t window = 8;
  std::int64_t kernel = 5;
  std::string pooling = "avg";
  std::string vote = "mean";
  std::string spec() const {
    return "snapkv:capacity=" + std::to_string(capacity) + ",window=" + std::to_string(window) +
           ",kernel=" + std::to_string(kernel) + ",pooling=" + pooling + ",vote=" + vote;
  }
};

using Kept = std::vector<std::set<std::int64_t>>;

std::vector<std::int64_t> best(const std::vector<double>& scores, std::int64_t count) {
  std::vector<std::int64_t> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return scores[a] > scores[b]; });
  order.resize(static_cast<std::size_t>(std::min<std::int64_t>(count, std::ssize(order))));
  return order;
}

/// What each kv head keeps of a prompt whose candidates (ascending positions, all queries see those before them) are
/// given; the prompt is dense.
Kept kept_by_definition(CacheCase& input, const Rule& rule, std::int64_t prompt, const Kept& candidates) {
  const std::int64_t group = input.shape().q_heads / input.shape().kv_heads;
  Kept kept;
  for (std::int64_t head = 0; head < input.shape().kv_heads; ++head) {
    const auto& all = candidates[static_cast<std::size_t>(head)];
    std::vector<std::int64_t> before;
    std::set<std::int64_t> result;
    for (const std::int64_t j : all) {
      if (j < prompt - rule.window) {
        before.push_back(j);
      } else {
        result.insert(j);
      }
    }
    std::vector<double> joint(before.size());
    for (std::int64_t g = 0; g < group; ++g) {
      std::vector<double> votes(before.size());
      for (std::int64_t token = prompt - rule.window; token < prompt; ++token) {
        const auto p = input.probabilities(token, head * group + g, [&](auto j) { return all.contains(j); });
        for (std::size_t i = 0; i < before.size(); ++i) votes[i] += p[static_cast<std::size_t>(before[i])];
      }
      std::vector<double> pooled(before.size());
      const std::int64_t reach = rule.kernel / 2;
      for (std::int64_t i = 0; i < std::ssize(before); ++i) {
        double sum = 0;
        double largest = 0;
        for (std::int64_t n = std::max<std::int64_t>(0, i - reach);
             n <= std::min<std::int64_t>(std::ssize(before) - 1, i + reach); ++n) {
          sum += votes[static_cast<std::size_t>(n)];
          largest = std::max(largest, votes[static_cast<std::size_t>(n)]);
        }
        pooled[static_cast<std::size_t>(i)] = rule.pooling == "avg" ? sum / static_cast<double>(rule.kernel) : largest;
      }
      if (rule.vote == "union") {
        for (const auto i : best(pooled, rule.capacity - rule.window)) {
          result.insert(before[static_cast<std::size_t>(i)]);
        }
      }
      for (std::size_t i = 0; i < joint.size(); ++i) {
        joint[i] = rule.vote == "max" ? std::max(joint[i], pooled[i]) : joint[i] + pooled[i];
      }
    }
    if (rule.vote != "union") {
      for (const auto i : best(joint, rule.capacity - rule.window)) result.insert(before[static_cast<std::size_t>(i)]);
    }
    kept.push_back(std::move(result));
  }
  return kept;
}

Kept everything(const CacheCase& input, std::int64_t tokens) {
  std::set<std::int64_t> all;
  for (std::int64_t j = 0; j < tokens; ++j) all.insert(j);
  return Kept(static_cast<std::size_t>(input.shape().kv_heads), all);
}

std::unique_ptr<LayerCache> new_cache(const Method& method, const CacheCase& input) {
  return method.new_cache(input.layer_shape(), {});
}

const auto kCausal = [](std::int64_t, std::int64_t token, std::int64_t j) { return j <= token; };

/// Decodes tokens [first, end) and compares with attention over what was kept and what came since `since`.
void expect_decode(CacheCase& input, LayerCache& cache, const Method& method, std::int64_t first, std::int64_t end,
                   const Kept& kept, std::int64_t since) {
  for (std::int64_t token = first; token < end; ++token) {
    const auto o = input.run(cache, method, token, 1, false);
    input.expect_attention(o, token, [&](auto head, auto, auto j) {
      return j >= since || kept[static_cast<std::size_t>(head)].contains(j);
    });
  }
}

TEST(SnapKV, KeepsWhatTheWindowVotesFor) {
  for (const CacheCaseShape& shape : test::cache_shapes()) {
    for (const Rule& rule :
         {Rule{}, Rule{.pooling = "max"}, Rule{.kernel = 1, .vote = "max"},
          Rule{.window = 31, .kernel = 9, .pooling = "max", .vote = "union"}, Rule{.capacity = 9, .vote = "union"}}) {
      SCOPED_TRACE(rule.spec());
      CacheCase input(shape);
      const auto method = make_method(rule.spec());
      const auto cache = new_cache(*method, input);
      ASSERT_NE(cache, nullptr);
      input.expect_attention(input.run(*cache, *method, 0, 300, true), 0, kCausal);
      const std::size_t before = cache->memory_bytes();
      cache->finish_prefill({});
      const Kept kept = kept_by_definition(input, rule, 300, everything(input, 300));
      std::int64_t rows = 0;
      for (const auto& head : kept) rows += std::ssize(head);
      EXPECT_EQ(cache->rows_kept(), rows);
      EXPECT_EQ(cache->tokens(), 300);
      // Whole pages of 16, and nothing of the prompt beside them.
      std::int64_t pages = 0;
      for (const auto& head : kept) pages += (std::ssize(head) + 15) / 16;
      const auto row_bytes = static_cast<std::int64_t>(size_of(shape.dtype)) * (shape.head_dim + shape.value_dim);
      EXPECT_EQ(cache->memory_bytes(), static_cast<std::size_t>(pages * 16 * row_bytes + rows * 4));
      EXPECT_LT(cache->memory_bytes(), before);
      expect_decode(input, *cache, *method, 300, 340, kept, 300);
      EXPECT_EQ(cache->rows_kept(), rows + 40 * shape.kv_heads);
    }
  }
}

TEST(SnapKV, ShortPromptsStayWhole) {
  CacheCase input({});
  const auto method = make_method("snapkv:capacity=301,window=8");
  const auto cache = new_cache(*method, input);
  input.run(*cache, *method, 0, 300, true);
  cache->finish_prefill({});
  EXPECT_EQ(cache->rows_kept(), 600);
  expect_decode(input, *cache, *method, 300, 310, everything(input, 300), 300);
}

TEST(SnapKV, ChunksAndThreadsChangeNothing) {
  const Rule rule;
  CacheCase input({});
  const auto method = make_method(rule.spec());
  const Kept kept = kept_by_definition(input, rule, 300, everything(input, 300));
  std::vector<float> first_output;
  for (const std::int64_t chunk : {300, 100, 7, 3, 1}) {
    for (const int threads : {1, 2, 5}) {
      PlanContext context;
      context.run.threads = threads;
      const auto cache = new_cache(*method, input);
      for (std::int64_t begin = 0; begin < 300; begin += chunk) {
        input.run(*cache, *method, begin, std::min<std::int64_t>(chunk, 300 - begin), true, context);
      }
      cache->finish_prefill(context);
      const auto o = input.run(*cache, *method, 300, 1, false, context);
      if (first_output.empty()) first_output = o;
      EXPECT_EQ(o, first_output) << "chunks of " << chunk << ", threads " << threads;
    }
  }
  input.expect_attention(first_output, 300, [&](auto head, auto, auto j) {
    return j >= 300 || kept[static_cast<std::size_t>(head)].contains(j);
  });
}

TEST(SnapKV, AnyPrefillMethodSeesTheWholePrompt) {
  CacheCase input({});
  const auto method = make_method(Rule{}.spec());
  const auto prefill = make_method("window:left=20");
  const auto cache = new_cache(*method, input);
  for (const std::int64_t begin : {0, 150}) {
    input.expect_attention(input.run(*cache, *prefill, begin, 150, true), begin,
                           [](auto, auto token, auto j) { return j <= token && token - j <= 20; });
  }
  cache->finish_prefill({});
  EXPECT_LT(cache->rows_kept(), 600);
}

TEST(SnapKV, FurtherPromptsAttendToWhatIsKeptAndAreCompressedWithIt) {
  const Rule rule;
  CacheCase input({});
  const auto method = make_method(rule.spec());
  const auto cache = new_cache(*method, input);
  input.run(*cache, *method, 0, 200, true);
  cache->finish_prefill({});
  Kept kept = kept_by_definition(input, rule, 200, everything(input, 200));
  expect_decode(input, *cache, *method, 200, 205, kept, 200);
  for (auto& head : kept) {
    for (std::int64_t j = 200; j < 205; ++j) head.insert(j);
  }
  // 150 rows: more than one query tile; in two chunks.
  for (const auto& [begin, count] : {std::pair<std::int64_t, std::int64_t>{205, 140}, {345, 10}}) {
    const auto o = input.run(*cache, *method, begin, count, true);
    input.expect_attention(o, begin, [&](auto head, auto token, auto j) {
      return j <= token && (j >= 205 || kept[static_cast<std::size_t>(head)].contains(j));
    });
  }
  cache->finish_prefill({});
  for (auto& head : kept) {
    for (std::int64_t j = 205; j < 355; ++j) head.insert(j);
  }
  kept = kept_by_definition(input, rule, 355, kept);
  EXPECT_EQ(cache->rows_kept(), 2 * rule.capacity);
  expect_decode(input, *cache, *method, 355, 365, kept, 355);
}

TEST(SnapKV, ANeedleOfTheWindowSurvivesWithItsNeighbours) {
  for (const std::string pooling : {"avg", "max"}) {
    CacheCase input({.q_heads = 2, .kv_heads = 1});
    for (std::int64_t token = 292; token < 300; ++token) {
      for (std::int64_t head = 0; head < 2; ++head) input.q(token, head)[0] = 8;
    }
    input.set_k(100, 0, [](auto d) { return d == 0 ? 12.0F : 0.0F; });
    const auto method = make_method("snapkv:capacity=13,window=8,kernel=5,pooling=" + pooling);
    const auto cache = new_cache(*method, input);
    input.run(*cache, *method, 0, 300, true);
    cache->finish_prefill({});
    // Room for five tokens beside the window: the needle and two on each side.
    expect_decode(input, *cache, *method, 300, 301, {{98, 99, 100, 101, 102, 292, 293, 294, 295, 296, 297, 298, 299}},
                  300);
  }
}

TEST(SnapKV, FailedPassesLeaveNothingBehind) {
  const Rule rule;
  CacheCase input({});
  const auto method = make_method(rule.spec());
  const auto cache = new_cache(*method, input);
  input.run(*cache, *method, 0, 190, true);
  input.run(*cache, *method, 190, 60, true);
  EXPECT_TRUE(cache->truncate(190));
  EXPECT_EQ(cache->tokens(), 190);
  input.run(*cache, *method, 190, 4, true);  // less than the window: the rest comes from the chunk before
  cache->finish_prefill({});
  const Kept kept = kept_by_definition(input, rule, 194, everything(input, 194));
  expect_decode(input, *cache, *method, 194, 196, kept, 194);
  EXPECT_TRUE(cache->truncate(195));
  expect_decode(input, *cache, *method, 195, 197, kept, 194);
  EXPECT_FALSE(cache->truncate(193)) << "evicted since";
  EXPECT_EQ(cache->tokens(), 197);
  cache->reset();
  EXPECT_EQ(cache->memory_bytes(), 0U);
  EXPECT_EQ(cache->tokens(), 0);
  input.expect_attention(input.run(*cache, *method, 0, 100, true), 0, kCausal);
}

TEST(SnapKV, RefusesParametersThatContradict) {
  using testing::HasSubstr;
  const auto message = [](const std::string& spec) {
    try {
      make_method(spec);
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string("no error");
  };
  EXPECT_THAT(message("snapkv:capacity=32,window=32"), HasSubstr("capacity=32 is not larger than window=32"));
  EXPECT_THAT(message("snapkv:kernel=4"), HasSubstr("kernel=4 is even"));
}

}  // namespace
}  // namespace tessera
