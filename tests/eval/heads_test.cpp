#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "eval/sparsity_dial.h"
#include "tessera/eval.h"

namespace tessera {
namespace {

HeadOptions small(const std::string& kind) {
  HeadOptions options;
  options.kind = kind;
  options.tokens = 600;
  options.q_heads = 4;
  options.kv_heads = 2;
  options.seed = 7;
  return options;
}

/// Sorted descending logits of one row of one head.
std::vector<float> sorted_logits(const HeadData& data, std::int64_t head, std::int64_t row) {
  const Problem& p = data.problem;
  const auto* q = reinterpret_cast<const float*>(data.q().row(0, head, row));
  const std::int64_t end = p.causal ? p.kv_len - p.q_len + row + 1 : p.kv_len;
  std::vector<float> logits;
  for (std::int64_t j = 0; j < end; ++j) {
    const auto* k = reinterpret_cast<const float*>(data.k().row(0, head / p.group(), j));
    logits.push_back(std::inner_product(q, q + p.head_dim, k, 0.0F) * p.softmax_scale());
  }
  std::sort(logits.begin(), logits.end(), std::greater<>());
  return logits;
}

class EveryKind : public testing::TestWithParam<std::string> {};

TEST_P(EveryKind, SameBytesForAnyThreadCount) {
  HeadOptions options = small(GetParam());
  options.threads = 1;
  const HeadData one = make_heads(options);
  options.threads = 3;
  const HeadData three = make_heads(options);
  EXPECT_EQ(one.q_bytes, three.q_bytes);
  EXPECT_EQ(one.k_bytes, three.k_bytes);
  EXPECT_EQ(one.v_bytes, three.v_bytes);
  options.seed += 1;
  EXPECT_NE(make_heads(options).k_bytes, one.k_bytes);
}

TEST_P(EveryKind, ShapesAndFiniteNumbers) {
  HeadOptions options = small(GetParam());
  options.batch = 2;
  options.head_dim = 64;
  options.value_dim = 48;
  const HeadData data = make_heads(options);
  EXPECT_NO_THROW(data.problem.validate());
  EXPECT_EQ(data.q().shape, (std::array<std::int64_t, 4>{2, 4, 600, 64}));
  EXPECT_EQ(data.k().shape, (std::array<std::int64_t, 4>{2, 2, 600, 64}));
  EXPECT_EQ(data.v().shape, (std::array<std::int64_t, 4>{2, 2, 600, 48}));
  EXPECT_EQ(data.archetypes.size(), 4);
  for (const auto* bytes : {&data.q_bytes, &data.k_bytes, &data.v_bytes}) {
    double power = 0;
    for (std::size_t at = 0; at < bytes->size(); at += sizeof(float)) {
      float value = 0;
      std::memcpy(&value, bytes->data() + at, sizeof(float));
      power += static_cast<double>(value) * value;
    }
    EXPECT_TRUE(std::isfinite(power));
    EXPECT_GT(power, 0);
  }
}

INSTANTIATE_TEST_SUITE_P(Heads, EveryKind, testing::ValuesIn(head_kinds()), [](const auto& instance) {
  std::string name = instance.param;
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
});

TEST(Heads, LastQueriesAreTheLastRowsOfAll) {
  HeadOptions options = small("mixed");
  const HeadData all = make_heads(options);
  options.q_tokens = 5;
  const HeadData last = make_heads(options);
  EXPECT_EQ(last.k_bytes, all.k_bytes);
  for (std::int64_t head = 0; head < 4; ++head) {
    EXPECT_EQ(std::memcmp(last.q().row(0, head, 0), all.q().row(0, head, 595), 5 * 128 * sizeof(float)), 0);
  }
}

TEST(Heads, HalfPrecisionIsTheRoundedData) {
  HeadOptions options = small("blocks");
  const HeadData full = make_heads(options);
  options.dtype = DType::bf16;
  const HeadData half = make_heads(options);
  ASSERT_EQ(half.q_bytes.size() * 2, full.q_bytes.size());
  for (std::int64_t c = 0; c < 128; ++c) {
    const float exact = load_as_float(full.q().row(0, 1, 33), DType::f32, c);
    EXPECT_EQ(load_as_float(half.q().row(0, 1, 33), DType::bf16, c), bf16_to_float(float_to_bf16(exact)));
  }
}

TEST(Heads, RotationKeepsTheLogits) {
  HeadOptions options = small("mixed");
  const HeadData rotated = make_heads(options);
  options.rotate = false;
  const HeadData plain = make_heads(options);
  EXPECT_NE(rotated.q_bytes, plain.q_bytes);
  // The constant added to the keys differs in direction, and shifts all logits of a row alike.
  const std::vector<float> a = sorted_logits(rotated, 0, 500);
  const std::vector<float> b = sorted_logits(plain, 0, 500);
  for (std::size_t i = 0; i < a.size(); ++i) EXPECT_NEAR(a[i] - a[0], b[i] - b[0], 1e-2);
}

TEST(Heads, DialReachesTheDensity) {
  for (const char* kind : {"blocks", "sink-band", "diffuse", "temporal"}) {
    for (const double target : {0.02, 0.2}) {
      HeadOptions options = small(kind);
      options.tokens = 2048;
      options.q_heads = options.kv_heads = 1;
      options.density = target;
      const HeadData data = make_heads(options);
      std::vector<std::vector<float>> rows;
      for (std::int64_t row = 259; row < 2048; row += 31) rows.push_back(sorted_logits(data, 0, row));
      EXPECT_NEAR(eval::top_p_density(rows, 1) / target, 1, 0.25) << kind << " " << target;
    }
  }
}

TEST(Heads, SinkTokensAttractButCarryLittle) {
  HeadOptions options = small("sink-band");
  const HeadData data = make_heads(options);
  const auto norm = [&](std::int64_t token) {
    const auto* v = reinterpret_cast<const float*>(data.v().row(0, 0, token));
    return std::sqrt(std::inner_product(v, v + 128, v, 0.0F));
  };
  EXPECT_LT(norm(0), 0.2F * norm(100));
  const auto* q = reinterpret_cast<const float*>(data.q().row(0, 0, 599));
  const auto logit = [&](std::int64_t token) {
    return std::inner_product(q, q + 128, reinterpret_cast<const float*>(data.k().row(0, 0, token)), 0.0F) /
           std::sqrt(128.0F);
  };
  EXPECT_GT(logit(0), logit(100) + 4);
}

TEST(Heads, SuitesMixTheirArchetypes) {
  HeadOptions options = small("heads-llm");
  options.tokens = 64;
  options.q_heads = options.kv_heads = 10;
  const std::vector<std::string> expected = {"sink-band",      "sink-band",      "sink-band", "power-law", "power-law",
                                             "vertical-slash", "vertical-slash", "blocks",    "retrieval", "diffuse"};
  EXPECT_EQ(make_heads(options).archetypes, expected);
}

TEST(Heads, VideoGridLeavesTextAtTheEnd) {
  HeadOptions options = small("heads-video");
  options.tokens = 16 * 8 * 8 + 64;
  HeadData data = make_heads(options);
  EXPECT_FALSE(data.problem.causal);
  EXPECT_EQ(data.grid, (std::array<std::int64_t, 3>{17, 8, 8}));
  options.grid = {{16, 8, 8}};
  data = make_heads(options);
  EXPECT_EQ(data.text_tokens, 64);
}

TEST(Heads, BadOptionsAreNamed) {
  const auto message = [](const HeadOptions& options) -> std::string {
    try {
      make_heads(options);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  HeadOptions options = small("verticals");
  EXPECT_NE(message(options).find("did you mean 'vertical'"), std::string::npos);
  options = small("blocks");
  options.q_heads = 3;
  EXPECT_NE(message(options).find("q_heads is 3"), std::string::npos);
  options = small("blocks");
  options.density = 1.5;
  EXPECT_NE(message(options).find("density is 1.5"), std::string::npos);
  options = small("blocks");
  options.grid = {{4, 4, 4}};
  EXPECT_NE(message(options).find("video"), std::string::npos);
  options = small("spatial");
  options.grid = {{100, 100, 100}};
  EXPECT_NE(message(options).find("100x100x100"), std::string::npos);
  options = small("randn");
  options.tokens = std::int64_t{1} << 60;
  EXPECT_NE(message(options).find("tokens is"), std::string::npos);
}

}  // namespace
}  // namespace tessera
