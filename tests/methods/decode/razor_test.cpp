// razor: the compensation token against its formula, folded while decoding; classes of heads; memory.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>

#include "methods/cache_case.h"

namespace tessera {
namespace {

using test::CacheCase;
using test::CacheCaseShape;
using testing::HasSubstr;

/// A file in the test's temporary folder, removed at the end.
class HeadFile {
 public:
  explicit HeadFile(const std::string& text)
      : path_(testing::TempDir() + "razor_" + testing::UnitTest::GetInstance()->current_test_info()->name() + ".json") {
    std::ofstream(path_) << text;
  }
  ~HeadFile() { std::filesystem::remove(path_); }
  HeadFile(const HeadFile&) = delete;
  HeadFile& operator=(const HeadFile&) = delete;
  /// sink 3, buffer max(20, N / 6).
  std::string spec() const { return "razor:sink=3,least=20,divisor=6,heads=" + path_; }

 private:
  std::string path_;
};

/// One layer whose first head is none of the retrieval heads.
std::string first_head_compressed(std::int64_t heads) {
  std::string text = R"({"retrieval": [[0)";
  for (std::int64_t head = 1; head < heads; ++head) text += ", 1";
  return text + "]]}";
}

/// Output of one query head by the formula: tokens [3, first) in one token of weight their number, the others exactly.
std::vector<double> by_formula(CacheCase& input, std::int64_t token, std::int64_t q_head, std::int64_t first) {
  const CacheCaseShape& shape = input.shape();
  const std::int64_t head = q_head / (shape.q_heads / shape.kv_heads);
  std::vector<double> mean_k(static_cast<std::size_t>(shape.head_dim));
  std::vector<double> mean_v(static_cast<std::size_t>(shape.value_dim));
  const double dropped = std::max<double>(0, static_cast<double>(first - 3));
  for (std::int64_t j = 3; j < first; ++j) {
    for (std::size_t d = 0; d < mean_k.size(); ++d) mean_k[d] += static_cast<double>(input.k(j, head)[d]) / dropped;
    for (std::size_t d = 0; d < mean_v.size(); ++d) mean_v[d] += static_cast<double>(input.v(j, head)[d]) / dropped;
  }
  // The cache holds the compensation token in its own type.
  if (shape.dtype == DType::bf16) {
    for (double& x : mean_k) x = bf16_to_float(float_to_bf16(static_cast<float>(x)));
    for (double& x : mean_v) x = bf16_to_float(float_to_bf16(static_cast<float>(x)));
  }
  if (shape.dtype == DType::f16) {
    for (double& x : mean_k) x = f16_to_float(float_to_f16(static_cast<float>(x)));
    for (double& x : mean_v) x = f16_to_float(float_to_f16(static_cast<float>(x)));
  }
  std::vector<double> out(mean_v.size());
  double sum = 0;
  const auto add = [&](double weight, const auto& key, const auto& value) {
    double score = 0;
    for (std::size_t d = 0; d < mean_k.size(); ++d) {
      score += static_cast<double>(input.q(token, q_head)[d]) * static_cast<double>(key(d));
    }
    const double p = weight * std::exp(score / std::sqrt(static_cast<double>(shape.head_dim)));
    sum += p;
    for (std::size_t d = 0; d < out.size(); ++d) out[d] += p * static_cast<double>(value(d));
  };
  if (dropped > 0)
    add(
        dropped, [&](auto d) { return mean_k[d]; }, [&](auto d) { return mean_v[d]; });
  for (std::int64_t j = 0; j <= token; ++j) {
    if (j >= 3 && j < first) continue;
    add(
        1, [&](auto d) { return input.k(j, head)[d]; }, [&](auto d) { return input.v(j, head)[d]; });
  }
  for (double& x : out) x /= sum;
  return out;
}

/// Outputs of tokens from `begin` on; compressed heads have dropped the tokens [3, first).
void expect_formula(CacheCase& input, const std::vector<float>& o, std::int64_t begin, std::int64_t first) {
  const CacheCaseShape& shape = input.shape();
  const std::int64_t group = shape.q_heads / shape.kv_heads;
  const std::int64_t row = shape.q_heads * shape.value_dim;
  for (std::int64_t token = begin; token < begin + std::ssize(o) / row; ++token) {
    for (std::int64_t q_head = 0; q_head < shape.q_heads; ++q_head) {
      const auto expected = by_formula(input, token, q_head, q_head / group == 0 ? first : 0);
      for (std::int64_t d = 0; d < shape.value_dim; ++d) {
        ASSERT_NEAR(o[static_cast<std::size_t>((token - begin) * row + q_head * shape.value_dim + d)],
                    expected[static_cast<std::size_t>(d)], 3e-5)
            << "token " << token << ", query head " << q_head;
      }
    }
  }
}

TEST(Razor, OneTokenStandsForTheDroppedOnes) {
  for (const CacheCaseShape& shape : test::cache_shapes()) {
    const HeadFile file(first_head_compressed(shape.kv_heads));
    const auto method = make_method(file.spec());
    CacheCase input(shape);
    const auto cache = method->new_cache(input.layer_shape(true), {});
    ASSERT_NE(cache, nullptr);
    for (const std::int64_t begin : {0, 120}) {
      input.expect_attention(input.run(*cache, *method, begin, 120, true), begin,
                             [](auto, auto token, auto j) { return j <= token; });
    }
    const std::size_t whole = cache->memory_bytes();
    cache->finish_prefill({});
    // max(20, 240 / 6) = 40 tokens of buffer.
    EXPECT_EQ(cache->rows_kept(), 43 + (shape.kv_heads - 1) * 240);
    EXPECT_LT(cache->memory_bytes(), whole);
    for (std::int64_t token = 240; token < 300; ++token) {
      // The token that leaves the buffer joins after the step.
      expect_formula(input, input.run(*cache, *method, token, 1, false), token, token - 40);
      EXPECT_EQ(cache->rows_kept(), 43 + (shape.kv_heads - 1) * (token + 1));
    }
    // A further prompt sees the compensation token too; then the buffer is 378 / 6.
    expect_formula(input, input.run(*cache, *method, 300, 78, true), 300, 260);
    cache->finish_prefill({});
    EXPECT_EQ(cache->rows_kept(), 66 + (shape.kv_heads - 1) * 378);
    expect_formula(input, input.run(*cache, *method, 378, 1, false), 378, 315);
  }
}

TEST(Razor, ShortSequencesAndRetrievalHeadsAreDense) {
  const HeadFile file(first_head_compressed(2));
  const auto method = make_method(file.spec());
  CacheCase input({});
  const auto cache = method->new_cache(input.layer_shape(true), {});
  input.run(*cache, *method, 0, 23, true);
  cache->finish_prefill({});
  EXPECT_EQ(cache->rows_kept(), 46);
  input.expect_attention(input.run(*cache, *method, 23, 1, false), 23, [](auto, auto, auto) { return true; });
  EXPECT_EQ(cache->rows_kept(), 47);
  const HeadFile all(R"({"retrieval": [[1, 1]]})");
  EXPECT_EQ(make_method(all.spec())->new_cache(input.layer_shape(), {}), nullptr);
  EXPECT_EQ(make_method("razor")->new_cache(input.layer_shape(), {}), nullptr);
}

TEST(Razor, EqualDroppedTokensAreExact) {
  const HeadFile file(first_head_compressed(1));
  const auto method = make_method(file.spec());
  CacheCase input({.q_heads = 2, .kv_heads = 1});
  for (std::int64_t j = 3; j < 250; ++j) {
    input.set_k(j, 0, [](auto d) { return 0.25F * static_cast<float>(d % 5) - 0.5F; });
    for (std::int64_t d = 0; d < input.shape().value_dim; ++d) input.v(j, 0)[d] = static_cast<float>(d);
  }
  const auto cache = method->new_cache(input.layer_shape(true), {});
  input.run(*cache, *method, 0, 240, true);
  cache->finish_prefill({});
  for (std::int64_t token = 240; token < 285; ++token) {
    input.expect_attention(input.run(*cache, *method, token, 1, false), token, [](auto, auto, auto) { return true; });
  }
}

TEST(Razor, ResetForgetsTheDroppedTokens) {
  const HeadFile file(first_head_compressed(2));
  const auto method = make_method(file.spec());
  CacheCase input({});
  const auto cache = method->new_cache(input.layer_shape(true), {});
  for (int round = 0; round < 2; ++round) {
    input.run(*cache, *method, 0, 120, true);
    cache->finish_prefill({});
    expect_formula(input, input.run(*cache, *method, 120, 1, false), 120, 100);
    EXPECT_FALSE(cache->truncate(120)) << "evicted since";
    cache->reset();
    EXPECT_EQ(cache->memory_bytes(), 0U);
    EXPECT_EQ(cache->tokens(), 0);
  }
}

TEST(Razor, NamesWhatIsWrong) {
  const auto message = [](const auto& action) {
    try {
      action();
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string("no error");
  };
  EXPECT_THAT(message([] { make_method("razor:sparsity=-0.5"); }), HasSubstr("sparsity=-0.5"));
  const HeadFile file(first_head_compressed(2));
  const auto method = make_method(file.spec());
  EXPECT_THAT(message([&] { method->check_model(2, 4, 2); }), HasSubstr("the model has 2 of 2"));
  const CacheCase input({.q_heads = 3, .kv_heads = 3});
  EXPECT_THAT(message([&] { method->new_cache(input.layer_shape(), {}); }), HasSubstr("are for 1 layers of 2"));
}

}  // namespace
}  // namespace tessera
