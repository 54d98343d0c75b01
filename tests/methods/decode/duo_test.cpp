// duo: classes of heads from a file; what streaming heads see in chunks and while decoding; constant memory.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "methods/cache_case.h"
#include "methods/head_classes.h"
#include "methods/masks.h"

namespace tessera {
namespace {

using test::CacheCase;
using test::CacheCaseShape;
using testing::ElementsAre;
using testing::HasSubstr;

/// A file in the test's temporary folder, removed at the end.
class HeadFile {
 public:
  explicit HeadFile(const std::string& text)
      : path_(testing::TempDir() + testing::UnitTest::GetInstance()->current_test_info()->name() + ".json") {
    std::ofstream(path_) << text;
  }
  ~HeadFile() { std::filesystem::remove(path_); }
  HeadFile(const HeadFile&) = delete;
  HeadFile& operator=(const HeadFile&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

std::string message_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

/// One layer; head h retrieves if bit h of `retrieving` is set.
std::string one_layer(std::int64_t heads, unsigned retrieving) {
  std::string text = R"({"sink": 5, "recent": 20, "retrieval": [[)";
  for (std::int64_t head = 0; head < heads; ++head) {
    text += (head > 0 ? ", " : "") + std::string((retrieving >> head & 1U) != 0 ? "0.9" : "0.1");
  }
  return text + "]]}";
}

bool sees(unsigned retrieving, std::int64_t head, std::int64_t token, std::int64_t j) {
  return j <= token && ((retrieving >> head & 1U) != 0 || j < 5 || token - j < 20);
}

TEST(Duo, StreamingHeadsSeeSinksAndTheExactWindowWhateverTheChunks) {
  for (const CacheCaseShape& shape : test::cache_shapes()) {
    // Two kv heads: one of each class. Others: the first head streams.
    const unsigned retrieving = 6;
    const HeadFile file(one_layer(shape.kv_heads, retrieving));
    const auto method = make_method("duo:heads=" + file.path());
    for (const bool own_prompt : {true, false}) {
      for (const std::int64_t chunk : {300, 129, 25, 7, 1}) {
        SCOPED_TRACE("chunk " + std::to_string(chunk) + (own_prompt ? ", own prompt" : ""));
        CacheCase input(shape);
        const auto cache = method->new_cache(input.layer_shape(own_prompt), {});
        ASSERT_NE(cache, nullptr);
        const auto exact = [&](auto head, auto token, auto j) { return sees(retrieving, head, token, j); };
        for (std::int64_t begin = 0; begin < 300; begin += chunk) {
          const auto o = input.run(*cache, *method, begin, std::min<std::int64_t>(chunk, 300 - begin), true);
          input.expect_attention(o, begin, exact);
        }
        cache->finish_prefill({});
        for (std::int64_t token = 300; token < 350; ++token) {
          input.expect_attention(input.run(*cache, *method, token, 1, false), token, exact);
        }
        // Streaming heads: 5 sinks and 19 tokens that the next one sees.
        EXPECT_EQ(cache->rows_kept(), 24 + (shape.kv_heads - 1) * 350);
        // A further prompt, after a ring was left out of order.
        for (const auto& [begin, count] : {std::pair<std::int64_t, std::int64_t>{350, 30}, {380, 1}, {381, 4}}) {
          input.expect_attention(input.run(*cache, *method, begin, count, true), begin, exact);
        }
        cache->finish_prefill({});
        input.expect_attention(input.run(*cache, *method, 385, 1, false), 385, exact);
      }
    }
  }
}

TEST(Duo, WholeChunksSeeMore) {
  const HeadFile file(one_layer(2, 2));
  const auto method = make_method("duo:whole_chunk=true,heads=" + file.path());
  CacheCase input({});
  const auto cache = method->new_cache(input.layer_shape(true), {});
  for (std::int64_t begin = 0; begin < 300; begin += 50) {
    const auto o = input.run(*cache, *method, begin, 50, true);
    input.expect_attention(
        o, begin, [&](auto head, auto token, auto j) { return j <= token && (head == 1 || j < 5 || j >= begin - 20); });
  }
  cache->finish_prefill({});
  for (std::int64_t token = 300; token < 330; ++token) {
    input.expect_attention(input.run(*cache, *method, token, 1, false), token,
                           [&](auto head, auto, auto j) { return head == 1 || j < 5 || token - j <= 20; });
  }
}

TEST(Duo, AnyPrefillMethodSeesTheWholePrompt) {
  const HeadFile file(one_layer(2, 2));
  const auto method = make_method("duo:heads=" + file.path());
  const auto dense = make_method("dense");
  CacheCase input({});
  const auto cache = method->new_cache(input.layer_shape(false), {});
  for (const std::int64_t begin : {0, 100}) {
    input.expect_attention(input.run(*cache, *dense, begin, 100, true), begin,
                           [](auto, auto token, auto j) { return j <= token; });
  }
  EXPECT_EQ(cache->rows_kept(), 400);
  cache->finish_prefill({});
  EXPECT_EQ(cache->rows_kept(), 224);
}

TEST(Duo, ShortSequencesAreDenseForAnyClasses) {
  for (const unsigned retrieving : {0U, 1U, 2U}) {
    const HeadFile file(one_layer(2, retrieving));
    const auto method = make_method("duo:heads=" + file.path());
    CacheCase input({});
    const auto cache = method->new_cache(input.layer_shape(true), {});
    for (const auto& [begin, count] : {std::pair<std::int64_t, std::int64_t>{0, 2}, {2, 9}, {11, 1}, {12, 8}}) {
      input.expect_attention(input.run(*cache, *method, begin, count, true), begin,
                             [](auto, auto token, auto j) { return j <= token; });
    }
    cache->finish_prefill({});
    for (std::int64_t token = 20; token < 25; ++token) {
      input.expect_attention(input.run(*cache, *method, token, 1, false), token, [](auto, auto, auto) { return true; });
    }
  }
}

TEST(Duo, MemoryOfStreamingHeadsIsConstant) {
  const HeadFile file(one_layer(2, 0));
  const auto method = make_method("duo:heads=" + file.path());
  CacheCase input({.tokens = 2000});
  const auto cache = method->new_cache(input.layer_shape(true), {});
  input.run(*cache, *method, 0, 50, true);
  const std::size_t after_one_chunk = cache->memory_bytes();
  for (std::int64_t begin = 50; begin < 1000; begin += 50) {
    input.run(*cache, *method, begin, 50, true);
    EXPECT_EQ(cache->memory_bytes(), after_one_chunk);
  }
  cache->finish_prefill({});
  input.run(*cache, *method, 1000, 1, false);
  const std::size_t decoding = cache->memory_bytes();
  for (std::int64_t token = 1001; token < 1100; ++token) input.run(*cache, *method, token, 1, false);
  EXPECT_EQ(cache->memory_bytes(), decoding);
  EXPECT_EQ(cache->rows_kept(), 2 * 24);
  EXPECT_FALSE(cache->truncate(1050)) << "evicted since";
  cache->reset();
  EXPECT_EQ(cache->memory_bytes(), 0U);
  input.expect_attention(input.run(*cache, *method, 0, 60, true), 0,
                         [](auto head, auto token, auto j) { return sees(0, head, token, j); });
}

TEST(Duo, FailedPassesAreTakenBackWhileNothingIsEvicted) {
  const HeadFile file(one_layer(2, 2));
  const auto method = make_method("duo:heads=" + file.path());
  CacheCase input({});
  const auto cache = method->new_cache(input.layer_shape(true), {});
  const auto exact = [](auto head, auto token, auto j) { return sees(2, head, token, j); };
  input.run(*cache, *method, 0, 10, true);
  input.run(*cache, *method, 10, 8, true);
  EXPECT_TRUE(cache->truncate(10));
  EXPECT_EQ(cache->rows_kept(), 20);
  input.expect_attention(input.run(*cache, *method, 10, 40, true), 10, exact);
  // Rows were appended, but the pass ended before their attention.
  cache->append(3, input.k(50, 0), input.v(50, 0), 1);
  EXPECT_TRUE(cache->truncate(50));
  input.expect_attention(input.run(*cache, *method, 50, 5, true), 50, exact);
}

TEST(Duo, LayersWithoutStreamingHeadsNeedNoCacheOfTheirOwn) {
  const HeadFile file(R"({"retrieval": [[1, 1], [1, 0]]})");
  const auto method = make_method("duo:heads=" + file.path());
  const CacheCase input({});
  PlanContext context;
  context.layers = 2;
  EXPECT_EQ(method->new_cache(input.layer_shape(), context), nullptr);
  context.layer = 1;
  EXPECT_NE(method->new_cache(input.layer_shape(), context), nullptr);
  EXPECT_EQ(make_method("duo")->new_cache(input.layer_shape(), context), nullptr);
}

TEST(Duo, PlansAreTheMaskOfTheClasses) {
  const HeadFile file(R"({"sink": 3, "recent": 30, "retrieval": [[1, 0], [0, 1]]})");
  for (const test::CaseShape& shape : test::all_shapes()) {
    test::CaseShape two = shape;
    two.q_heads = 4;
    two.kv_heads = 2;
    const test::AttentionCase input(two);
    for (const bool whole_chunk : {false, true}) {
      for (const std::int64_t layer : {0, 1}) {
        const auto method = make_method("duo:heads=" + file.path() + (whole_chunk ? ",whole_chunk=true" : ""));
        const auto expected = test::masks_where(input, [&](auto s, auto h, auto n, auto j) {
          if (!input.allowed(s, n, j)) return false;
          if (h / 2 == layer || j < 3) return true;
          if (whole_chunk) return j >= input.problem.q_offset_of(s) - 30;
          return std::abs(test::position(input, s, n) - j) < 30;
        });
        EXPECT_TRUE(test::masks_of(*method, input, 0, layer) == expected) << shape.name << " " << whole_chunk;
      }
    }
    test::expect_full_budget_is_dense(*make_method("duo"), input);
  }
}

TEST(HeadClasses, ThresholdOrShareOfStreamingHeads) {
  const HeadFile file(R"({"retrieval": [[0.5, 0.2, 0.8], [0.2, 0.49, 1]]})");
  const HeadClasses classes = read_head_classes({file.path()});
  EXPECT_EQ(classes.sink, -1);
  EXPECT_THAT(classes.retrieval(0.5, -1), ElementsAre(ElementsAre(true, false, true), ElementsAre(false, false, true)));
  EXPECT_THAT(classes.retrieval(0, -1), ElementsAre(ElementsAre(true, true, true), ElementsAre(true, true, true)));
  EXPECT_THAT(classes.retrieval(0.5, 0), ElementsAre(ElementsAre(true, true, true), ElementsAre(true, true, true)));
  // One of two equal gates: the later head streams.
  EXPECT_THAT(classes.retrieval(0.5, 0.2), ElementsAre(ElementsAre(true, true, true), ElementsAre(false, true, true)));
  EXPECT_THAT(classes.retrieval(0.5, 0.5),
              ElementsAre(ElementsAre(true, false, true), ElementsAre(false, false, true)));
  EXPECT_THAT(classes.retrieval(0.5, 1),
              ElementsAre(ElementsAre(false, false, false), ElementsAre(false, false, false)));
}

TEST(HeadClasses, NameWhatIsWrong) {
  const auto complaint = [](const std::string& text) {
    const HeadFile file(text);
    return message_of([&] { read_head_classes({file.path()}); });
  };
  EXPECT_THAT(complaint("[]"), HasSubstr("expected {\"retrieval\""));
  EXPECT_THAT(complaint(R"({"retrieval": []})"), HasSubstr("expected {\"retrieval\""));
  EXPECT_THAT(complaint(R"({"retrieval": [[]]})"), HasSubstr("layer 0 is not a list"));
  EXPECT_THAT(complaint(R"({"retrieval": [[1, 0], [1]]})"), HasSubstr("layer 1 is not a list"));
  EXPECT_THAT(complaint(R"({"retrieval": [[1, 1.5]]})"), HasSubstr("layer 0, head 1: gate 1.5"));
  EXPECT_THAT(complaint(R"({"retrieval": [["a"]]})"), HasSubstr("layer 0, head 0: gate \"a\""));
  EXPECT_THAT(complaint(R"({"retrieval": [[1]], "recent": 0})"), HasSubstr("recent is 0; expected 1 to"));
  EXPECT_THAT(complaint(R"({"retrieval": [[1]], "sink": 1.5})"), HasSubstr("sink"));
  EXPECT_THAT(complaint(R"({"retrieval": [[1]], "sinks": 1})"), HasSubstr("unknown key 'sinks'"));
  EXPECT_THAT(message_of([] { make_method("duo:recent=0"); }), HasSubstr("recent=0"));
  EXPECT_THAT(message_of([] { make_method("duo:sparsity=-0.5"); }), HasSubstr("sparsity=-0.5"));
  const HeadFile file(R"({"retrieval": [[1, 0]]})");
  const auto method = make_method("duo:heads=" + file.path());
  EXPECT_THAT(message_of([&] { method->check_model(2, 4, 2); }), HasSubstr("are for 1 layers of 2 kv heads"));
  EXPECT_NO_THROW(method->check_model(1, 4, 2));
  const CacheCase input({});
  PlanContext second;
  second.layer = 1;
  EXPECT_THROW(method->new_cache(input.layer_shape(), second), Error);
}

}  // namespace
}  // namespace tessera
