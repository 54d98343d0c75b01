// moa against the rule in blocks, its cache, and its file.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <set>

#include "core/error.h"
#include "io/temporary_folder.h"
#include "methods/cache_case.h"
#include "methods/elastic_spans.h"
#include "methods/masks.h"

namespace tessera {
namespace {

using test::AttentionCase;
using test::CaseShape;
using test::masks_of;
using test::masks_where;
using test::position;
using ::testing::HasSubstr;

TEST(ElasticSpans, GrowWithTheLength) {
  const ElasticSpan grows{-1024, 0.5};
  EXPECT_EQ(span_cache_tokens(grows, 4096), 1024);
  EXPECT_EQ(span_cache_tokens(grows, 8192), 3072);
  const ElasticSpan fixed{1000, 0};
  EXPECT_EQ(span_cache_tokens(fixed, 4096), 1024);  // whole blocks
  EXPECT_EQ(span_cache_tokens(fixed, 100000), 1024);
  EXPECT_EQ(span_cache_tokens(fixed, 300), 320);          // no longer than the sequence
  EXPECT_EQ(span_cache_tokens({-5000, 0.1}, 4096), 128);  // sinks and one block at least
  EXPECT_EQ(span_blocks(grows, 4096), 16);
  EXPECT_EQ(span_blocks({0, 1}, 1000), 16);
  EXPECT_EQ(span_blocks({0, 0}, 40), 1);
}

/// Block of a position counts; the sink block and the latest blocks, sinks counted in.
bool in_span(std::int64_t p, std::int64_t j, std::int64_t blocks) {
  return j / 64 == 0 || (j / 64 <= p / 64 && j / 64 > p / 64 - (blocks - 1));
}

class MoaShapes : public ::testing::TestWithParam<CaseShape> {};

TEST_P(MoaShapes, KeepsTheSinkBlockAndTheLatestBlocks) {
  const AttentionCase input(GetParam());
  if (!input.problem.causal) return;
  for (const auto& [alpha, beta] :
       std::vector<std::pair<int, double>>{{-100, 0.6}, {150, 0}, {0, 0.75}, {-1000, 0.5}}) {
    const auto expected = masks_where(input, [&, a = alpha, b = beta](auto s, auto, auto n, auto j) {
      const std::int64_t keys = input.problem.kv_len_of(s);
      const std::int64_t p = position(input, s, n);
      if (!input.allowed(s, n, j)) return false;
      const ElasticSpan rule{static_cast<double>(a), b};
      const std::int64_t nearest = std::min(p, keys - 1);
      if (input.problem.q_len_of(s) > 1) return in_span(nearest, j, span_blocks(rule, keys));
      return j < 64 || j > nearest - (span_cache_tokens(rule, keys) - 64);
    });
    const std::string spec = "moa:alpha=" + std::to_string(alpha) + ",beta=" + std::to_string(beta);
    EXPECT_TRUE(masks_of(spec, input) == expected) << spec;
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, MoaShapes, ::testing::ValuesIn(test::all_shapes()),
                         [](const auto& shape) { return shape.param.name; });

TEST(Moa, DecodesWhatARingCacheHolds) {
  // A static part of 64 tokens and a ring of the rest, filled by a prompt and turned by every new token.
  constexpr std::int64_t prompt = 700;
  constexpr std::int64_t steps = 300;
  const auto method = make_method("moa:alpha=-50,beta=0.4,new_tokens=" + std::to_string(steps));
  const auto state = method->new_state();
  PlanContext context;
  context.layer = 3;
  context.layers = 4;
  context.state = state.get();
  Problem problem;
  problem.q_len = problem.kv_len = prompt;
  problem.head_dim = problem.value_dim = 16;
  problem.causal = true;
  method->plan(problem, {}, context);

  const std::int64_t ring_size = span_cache_tokens({-50, 0.4}, prompt + steps) - 64;
  EXPECT_EQ(ring_size, 320);
  std::vector<std::int64_t> ring(static_cast<std::size_t>(ring_size));
  std::int64_t next = 0;
  const auto store = [&](std::int64_t token) {
    ring[next] = token;
    next = (next + 1) % ring_size;
  };
  for (std::int64_t token = 64; token < prompt; ++token) store(token);
  for (std::int64_t step = 0; step < steps; ++step) {
    const std::int64_t token = prompt + step;
    store(token);
    std::set<std::int64_t> held(ring.begin(), ring.end());
    for (std::int64_t sink = 0; sink < 64; ++sink) held.insert(sink);
    problem.q_len = 1;
    problem.kv_len = token + 1;
    const Plan plan = method->plan(problem, {}, context);
    const auto mask = dense_mask(plan);
    for (std::int64_t j = 0; j <= token; ++j) ASSERT_EQ(mask[j] != 0, held.contains(j)) << "step " << step << ", " << j;
  }
}

TEST(Moa, HeadsHaveTheirOwnRules) {
  const testing::TemporaryFolder folder;
  const SpanTable table{{{0, 1}, {0, 1}}, {{100, 0}, {0, 1}}};
  const std::string path = (folder / "rules.json").string();
  std::ofstream(path) << head_table_json(head_table_of(table)).dump();
  EXPECT_EQ(read_span_table({path}), table);

  const AttentionCase input({.name = "heads", .q_heads = 4, .kv_heads = 2, .q_len = 500, .kv_len = 500});
  const auto method = make_method("moa:config=" + path);
  EXPECT_TRUE(masks_of(*method, input, 0, 0) == test::dense_masks(input));
  const auto second = masks_of(*method, input, 0, 1);
  EXPECT_FALSE(second[0].at(499, 200));
  EXPECT_TRUE(second[0] == second[1]);
  EXPECT_TRUE(second[2].at(499, 200));
  EXPECT_THROW(masks_of(*method, input, 0, 2), Error);  // more layers than the file has
  const AttentionCase other({.name = "other", .q_heads = 3, .kv_heads = 3, .q_len = 500, .kv_len = 500});
  EXPECT_THROW(masks_of(*method, other), Error);
}

TEST(Moa, ReadsFilesStrictly) {
  const testing::TemporaryFolder folder;
  const std::string path = (folder / "rules.json").string();
  const auto message_of = [&](const std::string& text) -> std::string {
    std::ofstream(path) << text;
    try {
      make_method("moa:config=" + path);
    } catch (const Error& error) {
      return error.what();
    }
    return "accepted";
  };
  EXPECT_EQ(message_of(R"({"heads": [[{"class": "full"}, {"alpha": -1024, "beta": 0.5}]]})"), "accepted");
  EXPECT_THAT(message_of(R"({"heads": 3})"), HasSubstr("not a list"));
  EXPECT_THAT(message_of(R"({"heads": []})"), HasSubstr("has no heads"));
  EXPECT_THAT(message_of(R"({"heads": [[], []]})"), HasSubstr("has no heads"));
  EXPECT_THAT(message_of(R"({"heads": [3]})"), HasSubstr("layer 0"));
  EXPECT_THAT(message_of(R"({"heads": [[3]]})"), HasSubstr("head 0"));
  EXPECT_THAT(message_of(R"({"heads": [[{"alpha": 1}]]})"), HasSubstr("beta"));
  EXPECT_THAT(message_of(R"({"heads": [[{"alpha": 1, "beta": 2}]]})"), HasSubstr("beta 2"));
  EXPECT_THAT(message_of(R"({"heads": [[{"class": "odd"}]]})"), HasSubstr("'odd'"));
}

/// Rules for the heads of one layer, in turn: 64 sinks and a ring of 128; everything; a span that grows with the
/// prompt.
std::string rules_of_heads(std::int64_t heads) {
  static const char* const rules[] = {R"({"alpha": 150, "beta": 0})", R"({"class": "full"})",
                                      R"({"alpha": -50, "beta": 0.7})"};
  std::string text = R"({"new_tokens": 20, "config": {"heads": [[)";
  for (std::int64_t head = 0; head < heads; ++head) text += (head > 0 ? ", " : "") + std::string(rules[head % 3]);
  return text + "]]}}";
}

TEST(Moa, TheCacheHoldsSinksAndARingPerHead) {
  for (const test::CacheCaseShape& shape : test::cache_shapes()) {
    for (const bool own_prompt : {false, true}) {
      test::CacheCase input(shape);
      const auto method = find_method("moa").make(rules_of_heads(shape.kv_heads));
      const auto cache = method->new_cache(input.layer_shape(own_prompt), {});
      ASSERT_NE(cache, nullptr);
      const auto prefill = make_method("dense");
      for (const std::int64_t begin : {0, 200}) {
        const std::int64_t count = begin == 0 ? 200 : 50;
        const auto o = input.run(*cache, *prefill, begin, count, true);
        input.expect_attention(o, begin, [](auto, auto token, auto j) { return j <= token; });
      }
      EXPECT_EQ(cache->rows_kept(), 250 * shape.kv_heads) << "the prompt is whole until its end";
      const std::size_t whole = cache->memory_bytes();
      cache->finish_prefill({});
      // -50 + 0.7 * (250 + 20) = 139 tokens: 192 with whole blocks.
      const std::int64_t kept[] = {192, 1 << 20, 192};
      const auto rows = [&](std::int64_t tokens) {
        std::int64_t sum = 0;
        for (std::int64_t head = 0; head < shape.kv_heads; ++head) sum += std::min(tokens, kept[head % 3] - 1);
        return sum;
      };
      EXPECT_EQ(cache->rows_kept(), rows(250));
      EXPECT_LT(cache->memory_bytes(), whole);
      const auto sees = [&](std::int64_t head, std::int64_t token, std::int64_t j) {
        return j < 64 || token - j < kept[head % 3] - 64;
      };
      for (std::int64_t token = 250; token < 320; ++token) {
        input.expect_attention(input.run(*cache, *method, token, 1, false), token, sees);
        EXPECT_EQ(cache->rows_kept(), rows(token + 1));
      }
      EXPECT_FALSE(cache->truncate(300)) << "evicted since";
      // A further prompt sees what is kept and all of itself; its end sets the sizes anew: -50 + 0.7 * 390 = 223.
      const auto o = input.run(*cache, *method, 320, 50, true);
      input.expect_attention(o, 320, [&](auto head, auto token, auto j) {
        return j <= token && (j >= 320 || j < 64 || 320 - j < kept[head % 3] - 64);
      });
      cache->finish_prefill({});
      const std::int64_t larger[] = {192, 1 << 20, 256};
      input.expect_attention(input.run(*cache, *method, 370, 1, false), 370, [&](auto head, auto token, auto j) {
        const bool there = j >= 320 || j < 64 || 320 - j < kept[head % 3] - 64;
        return there && (j < 64 || token - j < larger[head % 3] - 64);
      });
      cache->reset();
      EXPECT_EQ(cache->memory_bytes(), 0U);
      input.expect_attention(input.run(*cache, *prefill, 0, 80, true), 0,
                             [](auto, auto token, auto j) { return j <= token; });
    }
  }
}

TEST(Moa, CachesOfShortSequencesAndOfWholeHeadsEvictNothing) {
  test::CacheCase input({});
  const auto method = make_method("moa:alpha=0,beta=0.5");
  const auto cache = method->new_cache(input.layer_shape(), {});
  // Without a prompt, and with one that is shorter than sinks and one block.
  for (const std::int64_t prompt : {0, 40}) {
    cache->reset();
    if (prompt > 0) {
      input.run(*cache, *method, 0, prompt, true);
      cache->finish_prefill({});
    }
    for (std::int64_t token = prompt; token < 100; ++token) {
      input.expect_attention(input.run(*cache, *method, token, 1, false), token, [](auto, auto, auto) { return true; });
    }
    EXPECT_EQ(cache->rows_kept(), 200);
  }
  EXPECT_EQ(make_method("moa:beta=1")->new_cache(input.layer_shape(), {}), nullptr);
}

TEST(Moa, AHeadThatSeesEverythingDoesSoForever) {
  const auto method = make_method("moa:beta=1,new_tokens=10");
  const auto state = method->new_state();
  PlanContext context;
  context.state = state.get();
  Problem problem;
  problem.q_len = problem.kv_len = 300;
  problem.head_dim = problem.value_dim = 16;
  problem.causal = true;
  method->plan(problem, {}, context);
  problem.q_len = 1;
  problem.kv_len = 500;  // far more new tokens than it was told of
  EXPECT_DOUBLE_EQ(statistics(method->plan(problem, {}, context)).density, 1);
}

TEST(Moa, ChecksTheModel) {
  const auto method = find_method("moa").make(rules_of_heads(3));
  EXPECT_NO_THROW(method->check_model(1, 6, 3));
  EXPECT_THROW(method->check_model(2, 6, 3), Error);
  EXPECT_THROW(method->check_model(1, 4, 2), Error);
  EXPECT_NO_THROW(make_method("moa")->check_model(40, 32, 8));
}

TEST(Moa, NeedsCausality) {
  const AttentionCase input({.name = "both", .q_len = 30, .kv_len = 30, .causal = false});
  EXPECT_THROW(make_method("moa")->plan(input.problem, {}, {}), Error);
}

}  // namespace
}  // namespace tessera
