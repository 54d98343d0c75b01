// Token Sparse Attention: the count shared by heads, each head's own tokens, and attention among them.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>

#include "methods/diffusion/pooled_reference.h"
#include "methods/masks.h"

namespace tessera {
namespace {

using test::AttentionCase;
using test::CaseShape;
using test::HeadMask;
using test::masks_of;

/// The text once more, in float64 and with plain loops: tokens that each head keeps; empty when none is dropped.
std::vector<std::set<std::int64_t>> expected_tokens(const AttentionCase& input, std::int64_t s, double tau,
                                                    std::int64_t least, std::int64_t w, std::int64_t pool) {
  const Problem& problem = input.problem;
  const std::int64_t keys = problem.kv_len_of(s);
  const std::int64_t queries = problem.q_len_of(s);
  if (keys <= least + w || queries <= w) return {};
  const std::int64_t n = keys - w;
  std::vector<std::vector<double>> scores;
  std::vector<double> mean(static_cast<std::size_t>(n), 0.0);
  for (std::int64_t h = 0; h < problem.q_heads; ++h) {
    std::vector<double> a(static_cast<std::size_t>(keys), 0.0);
    for (std::int64_t r = queries - w; r < queries; ++r) {
      const auto p = input.probabilities(s, h, r);
      for (std::int64_t j = 0; j < keys; ++j) a[j] += p[j] / static_cast<double>(w);
    }
    std::vector<double> smooth(static_cast<std::size_t>(n), 0.0);
    for (std::int64_t j = 0; j < n; ++j) {
      for (std::int64_t i = j - pool / 2; i <= j + pool / 2; ++i) {
        if (i >= 0 && i < n) smooth[j] += a[i] / static_cast<double>(pool);
      }
      mean[j] += smooth[j] / static_cast<double>(problem.q_heads);
    }
    scores.push_back(smooth);
  }
  const double total = std::accumulate(mean.begin(), mean.end(), 0.0);
  std::sort(mean.begin(), mean.end());
  std::int64_t dropped = 0;
  double sum = 0;
  for (const double x : mean) dropped += (sum += x / total) < tau ? 1 : 0;
  if (dropped == 0) return {};
  const std::int64_t keep = std::max(least, n - (dropped + 1));
  std::vector<std::set<std::int64_t>> kept;
  for (const auto& head : scores) {
    std::vector<std::int64_t> order(static_cast<std::size_t>(n));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return head[a] > head[b]; });
    std::set<std::int64_t> tokens(order.begin(), order.begin() + keep);
    for (std::int64_t j = n; j < keys; ++j) tokens.insert(j);
    kept.push_back(tokens);
  }
  return kept;
}

TEST(TokenSparse, FollowsTheTextWithPlainLoops) {
  std::int64_t dropping = 0;
  for (const CaseShape& shape :
       {CaseShape{.name = "square", .q_heads = 4, .kv_heads = 2, .q_len = 333, .kv_len = 333},
        CaseShape{.name = "chunk", .q_heads = 4, .kv_heads = 2, .q_len = 150, .kv_len = 411},
        CaseShape{.name = "ahead", .q_len = 120, .kv_len = 200, .q_offset = 100},
        CaseShape{.name = "behind", .q_len = 120, .kv_len = 200, .q_offset = -10},
        CaseShape{.name = "ragged", .q_heads = 2, .q_lens = {130, 0, 20, 90}, .kv_lens = {260, 10, 40, 90}},
        CaseShape{.name = "pages", .batch = 2, .q_len = 100, .kv_len = 250, .page_size = 16}}) {
    SCOPED_TRACE(shape.name);
    const AttentionCase input(shape);
    const std::int64_t heads = input.problem.q_heads;
    for (const auto& [tau, least, w, pool] :
         {std::tuple{0.3, 20, 16, 7}, {0.05, 1, 33, 1}, {1.0, 40, 16, 3}, {0.5, 1, 1, 15}, {0.002, 30, 20, 7}}) {
      const auto masks = masks_of(
          fmt::format("token-sparse:tau={},min_tokens={},window={},pool={},layers=all", tau, least, w, pool), input);
      for (std::int64_t s = 0; s < input.problem.batch; ++s) {
        const auto kept = expected_tokens(input, s, tau, least, w, pool);
        dropping += kept.empty() ? 0 : 1;
        for (std::int64_t h = 0; h < heads; ++h) {
          const HeadMask& mask = masks[s * heads + h];
          for (std::int64_t n = 0; n < mask.queries; ++n) {
            const std::int64_t position = test::position(input, s, n);
            const bool runs = kept.empty() || position >= mask.keys || kept[h].contains(position);
            for (std::int64_t j = 0; j < mask.keys; ++j) {
              ASSERT_EQ(mask.at(n, j), runs && input.allowed(s, n, j) && (kept.empty() || kept[h].contains(j)))
                  << "tau " << tau << ", sequence " << s << ", head " << h << ", query " << n << ", key " << j;
            }
          }
        }
      }
    }
  }
  EXPECT_GT(dropping, 20);
}

TEST(TokenSparse, DroppedRowsAreZeroAndTheWindowNeverIs) {
  const AttentionCase input({.name = "rows", .q_heads = 4, .kv_heads = 2, .q_len = 400, .kv_len = 400});
  const auto method = make_method("token-sparse:tau=0.3,min_tokens=50,window=32,layers=all");
  const test::Result result = test::attend(*method, input);
  const auto kept = expected_tokens(input, 0, 0.3, 50, 32, 7);
  std::int64_t zero = 0;
  for (std::int64_t h = 0; h < 4; ++h) {
    for (std::int64_t n = 0; n < 400; ++n) {
      const std::int64_t row = test::output_row(input.problem, 0, h, n);
      const float* o = result.o.data() + row * 8;
      if (!kept[h].contains(n)) {
        ++zero;
        for (std::int64_t d = 0; d < 8; ++d) ASSERT_EQ(o[d], 0.0F);
        ASSERT_EQ(result.lse[row], -std::numeric_limits<float>::infinity());
        continue;
      }
      // Attention over the kept subset in float64.
      const auto p = input.probabilities(0, h, n);
      double mass = 0;
      std::vector<double> expected(8, 0.0);
      for (const std::int64_t j : kept[h]) {
        mass += p[j];
        for (std::int64_t d = 0; d < 8; ++d) expected[d] += p[j] * input.v(0, h / 2, j, d);
      }
      for (std::int64_t d = 0; d < 8; ++d) ASSERT_NEAR(o[d], expected[d] / mass, 2e-4) << h << " " << n;
    }
    for (std::int64_t n = 368; n < 400; ++n) EXPECT_TRUE(kept[h].contains(n));
  }
  EXPECT_GT(zero, 100);
  EXPECT_EQ(result.o, test::attend(*method, input, KernelKind::automatic, 1).o);
}

TEST(TokenSparse, EveryHeadDropsAsManyAndItsOwn) {
  const AttentionCase input({.name = "own", .q_heads = 4, .kv_heads = 1, .q_len = 300, .kv_len = 300});
  const auto masks = masks_of("token-sparse:tau=0.2,min_tokens=10,window=20,layers=all", input);
  const auto count = [&](const HeadMask& mask) {
    return std::count(mask.bits.end() - 300, mask.bits.end(), std::uint8_t{1});
  };
  for (std::int64_t h = 1; h < 4; ++h) {
    EXPECT_EQ(count(masks[h]), count(masks[0]));
    EXPECT_FALSE(masks[h] == masks[0]);
  }
}

TEST(TokenSparse, InnerMethodRunsOnWhatIsLeft) {
  // The mask of `inner` on the compacted tensors, said in original tokens. A window counts kept tokens only.
  const AttentionCase input({.name = "inner", .q_heads = 2, .kv_heads = 2, .q_len = 300, .kv_len = 300});
  const auto kept = expected_tokens(input, 0, 0.3, 20, 16, 7);
  ASSERT_FALSE(kept.empty());
  for (const std::string inner : {"dense", "window", "streaming", "oracle-topk", "flexprefill", "minference"}) {
    const auto masks = masks_of("token-sparse:tau=0.3,min_tokens=20,window=16,layers=all,inner=" + inner, input);
    const auto length = static_cast<std::int64_t>(kept[0].size());
    AttentionCase compact({.name = "compact", .q_heads = 2, .kv_heads = 2, .q_len = length, .kv_len = length});
    for (std::int64_t h = 0; h < 2; ++h) {
      std::int64_t at = 0;
      for (const std::int64_t n : kept[h]) {
        for (std::int64_t d = 0; d < 16; ++d) {
          compact.set_q(0, h, at, d, input.q(0, h, n, d));
          compact.set_k(0, h, at, d, input.k(0, h, n, d));
        }
        ++at;
      }
    }
    const auto expected = masks_of(inner, compact);
    for (std::int64_t h = 0; h < 2; ++h) {
      const std::vector<std::int64_t> tokens(kept[h].begin(), kept[h].end());
      HeadMask spread{300, 300, std::vector<std::uint8_t>(90000, 0)};
      for (std::int64_t a = 0; a < length; ++a) {
        for (std::int64_t b = 0; b < length; ++b) spread.bits[tokens[a] * 300 + tokens[b]] = expected[h].at(a, b);
      }
      EXPECT_TRUE(masks[h] == spread) << inner << ", head " << h;
    }
  }
  // A window narrower than what is left, so that its band is not the causal one.
  const auto small = testing::TempDir() + "token_sparse_window.json";
  std::FILE* file = std::fopen(small.c_str(), "w");
  ASSERT_NE(file, nullptr);
  std::fputs(R"({"method": "window", "parameters": {"left": 9, "right": 0}})", file);
  std::fclose(file);
  const auto masks = masks_of("token-sparse:tau=0.3,min_tokens=20,window=16,layers=all,inner=" + small, input);
  for (std::int64_t h = 0; h < 2; ++h) {
    const std::vector<std::int64_t> tokens(kept[h].begin(), kept[h].end());
    for (std::size_t a = 0; a < tokens.size(); ++a) {
      for (std::size_t b = 0; b < tokens.size(); ++b) {
        ASSERT_EQ(masks[h].at(tokens[a], tokens[b]), b <= a && a <= b + 9) << h << " " << a << " " << b;
      }
    }
  }
}

TEST(TokenSparse, NothingToDropIsTheInnerMethod) {
  for (const CaseShape& shape : test::all_shapes()) {
    SCOPED_TRACE(shape.name);
    const AttentionCase input(shape);
    for (const std::string spec : {"token-sparse:tau=0,min_tokens=1,window=8,layers=all", "token-sparse:tau=0.5",
                                   "token-sparse:tau=0.9,min_tokens=100000,window=1,layers=all"}) {
      const auto method = make_method(spec);
      if (!input.problem.causal) {
        EXPECT_THROW(method->plan(input.problem, input.inputs, {}), Error);
      } else {
        test::expect_full_budget_is_dense(*method, input);
      }
    }
    if (!input.problem.causal) continue;
    EXPECT_TRUE(masks_of("token-sparse:tau=0,layers=all,inner=oracle-topk", input) == masks_of("oracle-topk", input));
  }
}

TEST(TokenSparse, PlansAreValidAndDoNotDependOnThreads) {
  for (const CaseShape& shape : test::all_shapes()) {
    const AttentionCase input(shape);
    if (!input.problem.causal) continue;
    SCOPED_TRACE(shape.name);
    for (const std::string inner : {"dense", "flexprefill", "proxyattn"}) {
      const auto method = make_method("token-sparse:tau=0.6,min_tokens=3,window=5,layers=all,inner=" + inner);
      EXPECT_TRUE(masks_of(*method, input, 1) == masks_of(*method, input, 2));
    }
  }
}

TEST(TokenSparse, OnlyChosenLayersDrop) {
  const AttentionCase input({.name = "layers", .q_len = 200, .kv_len = 200});
  const auto dense = test::dense_masks(input);
  const auto drops = [&](const std::string& layers, std::int64_t layer, std::int64_t count) {
    PlanContext context;
    context.layer = layer;
    context.layers = count;
    const auto method = make_method("token-sparse:tau=0.3,min_tokens=20,window=16,layers=" + layers);
    const Plan plan = method->plan(input.problem, input.inputs, context);
    return !(test::head_mask(plan, dense_mask(plan), 0, 0) == dense[0]);
  };
  EXPECT_FALSE(drops("upper", 15, 32));
  EXPECT_TRUE(drops("upper", 16, 32));
  EXPECT_TRUE(drops("upper", 0, 1));
  EXPECT_TRUE(drops("all", 0, 32));
  EXPECT_TRUE(drops("3+7-9", 8, 32));
  EXPECT_FALSE(drops("3+7-9", 6, 32));
}

TEST(TokenSparse, PlainInputsStayCorrect) {
  // Equal keys: all probabilities equal; huge logits: one key has everything. No NaN, and what is kept is attended to.
  for (const float size : {0.0F, 3e4F}) {
    AttentionCase input({.name = "plain", .q_heads = 2, .q_len = 260, .kv_len = 260});
    for (std::int64_t n = 0; n < 260; ++n) {
      for (std::int64_t d = 0; d < 16; ++d) input.set_k(0, 0, n, d, size * static_cast<float>(n == 40 && d == 0));
    }
    const auto method = make_method("token-sparse:tau=0.4,min_tokens=20,window=16,layers=all");
    const test::Result result = test::attend(*method, input);
    for (const float x : result.o) ASSERT_TRUE(std::isfinite(x));
    for (const auto& mask : masks_of(*method, input)) {
      for (std::int64_t n = 244; n < 260; ++n) ASSERT_TRUE(mask.at(n, n));
    }
  }
  AttentionCase undefined({.name = "nan", .q_heads = 2, .q_len = 260, .kv_len = 260});
  undefined.set_k(0, 0, 40, 3, std::nanf(""));
  EXPECT_TRUE(masks_of("token-sparse:tau=0.4,min_tokens=20,window=16,layers=all", undefined) ==
              test::dense_masks(undefined));
}

TEST(TokenSparse, BadParameters) {
  EXPECT_THROW(make_method("token-sparse:pool=4"), Error);
  EXPECT_THROW(make_method("token-sparse:layers=upp"), Error);
  EXPECT_THROW(make_method("token-sparse:inner=token-sparse"), Error);
  EXPECT_THROW(make_method("token-sparse:inner=kda"), Error);
  EXPECT_THROW(make_method("token-sparse:inner=psa"), Error);
  EXPECT_THROW(make_method("token-sparse:tau=1.5"), Error);
}

}  // namespace
}  // namespace tessera
