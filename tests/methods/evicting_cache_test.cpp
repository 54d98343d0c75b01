// What holds for every cache of a method: tokens that are decoded before any prompt.
#include <gtest/gtest.h>

#include "io/json.h"
#include "methods/cache_case.h"
#include "methods/layered.h"

namespace tessera {
namespace {

using test::CacheCase;

const char* const kMethods[] = {
    R"({"method": "h2o", "parameters": {"heavy": 10, "recent": 10}})",
    R"({"method": "snapkv", "parameters": {"capacity": 30, "window": 8}})",
    R"({"method": "razor", "parameters": {"sink": 2, "least": 20, "heads": {"retrieval": [[0, 1]]}}})",
    R"({"method": "duo", "parameters": {"sink": 2, "recent": 60, "heads": {"retrieval": [[0, 1]]}}})",
    R"({"method": "moa", "parameters": {"alpha": 0, "beta": 0.1}})",
    R"({"method": "streaming", "parameters": {"n_init": 2, "n_local": 60}})",
    R"({"method": "mustafar"})",
    R"({"method": "zipcache"})",
    R"({"method": "think"})",
};

TEST(MethodCaches, TokensDecodedBeforeAnyPromptAreAllThere) {
  for (const char* text : kMethods) {
    SCOPED_TRACE(text);
    for (const bool own_prompt : {false, true}) {
      CacheCase input({});
      const auto method = make_method_of(parse_json(text, "test"), "test");
      const auto cache = method->new_cache(input.layer_shape(own_prompt), {});
      ASSERT_NE(cache, nullptr);
      for (std::int64_t token = 0; token < 50; ++token) {
        input.expect_attention(input.run(*cache, *method, token, 1, false), token,
                               [](auto, auto, auto) { return true; });
      }
      EXPECT_EQ(cache->rows_kept(), 100);
      // Then a prompt, which ends, and more decoding: whatever is kept, outputs are finite and the last token is there.
      input.run(*cache, *make_method("dense"), 50, 100, true);
      cache->finish_prefill({});
      for (std::int64_t token = 150; token < 200; ++token) {
        for (const float x : input.run(*cache, *method, token, 1, false)) ASSERT_TRUE(std::isfinite(x));
      }
      EXPECT_EQ(cache->tokens(), 200);
    }
  }
}

}  // namespace
}  // namespace tessera
