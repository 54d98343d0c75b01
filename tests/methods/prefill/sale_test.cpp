// SALE: estimates of 4 bits, the relative bar, both forms, and the two phases as one softmax.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>

#include "methods/attended.h"

namespace tessera {
namespace {

using test::AttentionCase;
using test::CaseShape;
using test::HeadMask;
using test::masks_of;

struct Sizes {
  double threshold = 0.02;
  bool one_pass = false;
  std::int64_t block_q = 16;
  std::int64_t block_k = 16;
  std::int64_t local = 32;
  std::int64_t segment = 32;
  std::string spec() const {
    return fmt::format("sale:threshold={},form={},block_q={},block_k={},local={},segment={},dense_below=0", threshold,
                       one_pass ? "one_pass" : "two_pass", block_q, block_k, local, segment);
  }
};

using Row = std::vector<double>;

/// Numbers of 4 bits times their scale.
Row quantised(const Row& row) {
  double most = 0;
  for (const double x : row) most = std::max(most, std::fabs(x));
  const double scale = most == 0 ? 1 : most / 7;
  Row out;
  for (const double x : row) out.push_back(std::nearbyint(x / scale) * scale);
  return out;
}

double dot(const Row& a, const Row& b) {
  double sum = 0;
  for (std::size_t d = 0; d < a.size(); ++d) sum += a[d] * b[d];
  return sum;
}

Row minus(Row a, const Row& b) {
  for (std::size_t d = 0; d < a.size(); ++d) a[d] -= b[d];
  return a;
}

Row mean_of(const std::vector<Row>& rows) {
  Row mean(rows[0].size(), 0.0);
  for (const Row& row : rows) {
    for (std::size_t d = 0; d < mean.size(); ++d) mean[d] += row[d] / static_cast<double>(rows.size());
  }
  return mean;
}

/// First keys, then [begin of the local window, ...): the middle is a whole number of segments.
std::int64_t middle_end(const AttentionCase& input, std::int64_t s, std::int64_t n, const Sizes& sizes) {
  const std::int64_t first = test::position(input, s, n / sizes.block_q * sizes.block_q);
  const std::int64_t room = std::min(first - sizes.local, input.problem.kv_len_of(s)) - sizes.block_k;
  return sizes.block_k + (room <= 0 ? 0 : room / sizes.segment * sizes.segment);
}

/// The text once more, in float64 and with plain loops.
std::vector<HeadMask> expected_masks(const AttentionCase& input, const Sizes& sizes) {
  const Problem& problem = input.problem;
  const double scale = problem.softmax_scale();
  std::vector<HeadMask> masks;
  for (std::int64_t s = 0; s < problem.batch; ++s) {
    const std::int64_t keys = problem.kv_len_of(s);
    const std::int64_t queries = problem.q_len_of(s);
    for (std::int64_t h = 0; h < problem.q_heads; ++h) {
      HeadMask mask{queries, keys, std::vector<std::uint8_t>(static_cast<std::size_t>(queries * keys), 0)};
      std::vector<Row> q(static_cast<std::size_t>(queries));
      std::vector<Row> k(static_cast<std::size_t>(keys));
      for (std::int64_t d = 0; d < problem.head_dim; ++d) {
        for (std::int64_t n = 0; n < queries; ++n) q[n].push_back(input.q(s, h, n, d));
        for (std::int64_t j = 0; j < keys; ++j) k[j].push_back(input.k(s, h / problem.group(), j, d));
      }
      if (queries == 0 || keys == 0) {
        masks.push_back(mask);
        continue;
      }
      const Row q_mean = mean_of(q);
      const Row k_mean = mean_of(k);
      for (Row& row : k) row = minus(row, k_mean);  // smoothing concerns all passes
      std::vector<Row> k_low;
      k_low.reserve(k.size());
      for (const Row& row : k) k_low.push_back(quantised(row));
      for (std::int64_t first = 0; first < queries; first += sizes.block_q) {
        const std::int64_t end = std::min(first + sizes.block_q, queries);
        const std::int64_t middle = middle_end(input, s, first, sizes);
        std::vector<double> m(static_cast<std::size_t>(end - first), -INFINITY);
        std::vector<double> l(m.size(), 0.0);
        const auto add = [&](std::int64_t n, std::int64_t j) {
          mask.bits[n * keys + j] = 1;
          const double x = scale * dot(q[n], k[j]);
          double& most = m[n - first];
          double& sum = l[n - first];
          sum = sum * std::exp(most - std::max(most, x)) + std::exp(x - std::max(most, x));
          most = std::max(most, x);
        };
        for (std::int64_t n = first; n < end; ++n) {
          for (std::int64_t j = 0; j < keys; ++j) {
            if (input.allowed(s, n, j) && (j < sizes.block_k || j >= middle)) add(n, j);
          }
        }
        const auto m_then = m;
        const auto l_then = l;
        std::vector<std::int64_t> kept;
        for (std::int64_t j0 = sizes.block_k; j0 < middle; j0 += sizes.block_k) {
          if (sizes.one_pass && (j0 - sizes.block_k) % sizes.segment == 0) {
            for (const std::int64_t tile : kept) {  // of the segment before
              for (std::int64_t n = first; n < end; ++n) {
                for (std::int64_t j = tile; j < tile + sizes.block_k; ++j) add(n, j);
              }
            }
            kept.clear();
          }
          bool keep = false;
          for (std::int64_t n = first; n < end; ++n) {
            const double most = sizes.one_pass ? m[n - first] : m_then[n - first];
            const double sum = sizes.one_pass ? l[n - first] : l_then[n - first];
            const Row low = quantised(minus(q[n], q_mean));
            for (std::int64_t j = j0; j < j0 + sizes.block_k; ++j) {
              const double e = dot(low, k_low[j]) + dot(q_mean, k[j]);
              keep = keep || std::exp(scale * e - most) / sum > sizes.threshold;
            }
          }
          if (keep) kept.push_back(j0);
        }
        for (const std::int64_t tile : kept) {
          for (std::int64_t n = first; n < end; ++n) {
            for (std::int64_t j = tile; j < tile + sizes.block_k; ++j) add(n, j);
          }
        }
      }
      masks.push_back(mask);
    }
  }
  return masks;
}

TEST(Sale, FollowsTheTextWithPlainLoops) {
  std::int64_t pruned = 0;
  std::int64_t between = 0;
  for (const CaseShape& shape : {CaseShape{.name = "square", .q_heads = 4, .kv_heads = 2, .q_len = 250, .kv_len = 250},
                                 CaseShape{.name = "chunk", .batch = 2, .q_len = 70, .kv_len = 333, .head_dim = 18},
                                 CaseShape{.name = "lengths", .q_lens = {130, 0, 64}, .kv_lens = {260, 10, 64}}}) {
    AttentionCase input(shape);
    for (std::int64_t s = 0; s < input.problem.batch; ++s) {
      for (std::int64_t n = 0; n < input.problem.kv_len_of(s); ++n) {
        for (std::int64_t h = 0; h < input.problem.kv_heads; ++h) input.set_k(s, h, n, 2, input.k(s, h, n, 2) + 3);
      }
    }
    for (const Sizes& sizes : {Sizes{}, Sizes{.one_pass = true}, Sizes{.threshold = 0.1, .block_q = 32, .block_k = 32},
                               Sizes{.threshold = 0.05, .one_pass = true, .local = 0, .segment = 64}}) {
      SCOPED_TRACE(shape.name + " " + sizes.spec());
      const auto expected = expected_masks(input, sizes);
      EXPECT_TRUE(masks_of(sizes.spec(), input) == expected);
      between += expected == test::dense_masks(input) ? 0 : 1;
      Sizes two = sizes;
      two.one_pass = false;
      pruned += sizes.one_pass && !(expected == expected_masks(input, two)) ? 1 : 0;
    }
  }
  EXPECT_GT(between, 6);
  EXPECT_GT(pruned, 2);  // the one-pass form left more out
}

std::int64_t kept_pairs(const std::string& spec, const AttentionCase& input) {
  std::int64_t pairs = 0;
  for (const HeadMask& mask : masks_of(spec, input)) {
    for (const std::uint8_t bit : mask.bits) pairs += bit;
  }
  return pairs;
}

TEST(Sale, KeepsMoreAsTheThresholdFalls) {
  const AttentionCase input({.name = "falls", .q_len = 400, .kv_len = 400});
  const std::string sizes = ",block_q=16,block_k=16,local=32,segment=16,dense_below=0";
  std::vector<HeadMask> before;
  for (const std::string threshold : {"0.5", "0.1", "0.02", "0.004", "0"}) {
    const auto masks = masks_of(fmt::format("sale:threshold={}{}", threshold, sizes), input);
    for (std::size_t h = 0; h < before.size(); ++h) {
      for (std::size_t i = 0; i < before[h].bits.size(); ++i) ASSERT_LE(before[h].bits[i], masks[h].bits[i]);
    }
    before = masks;
  }
  EXPECT_TRUE(before == test::dense_masks(input));
  EXPECT_LT(kept_pairs("sale:threshold=0.1,form=one_pass" + sizes, input),
            kept_pairs("sale:threshold=0.5" + sizes, input) + 400 * 200);
}

TEST(Sale, APlantedKeyOutsideTheAnchorIsKept) {
  AttentionCase input({.name = "planted", .q_heads = 1, .q_len = 400, .kv_len = 400});
  for (std::int64_t n = 0; n < 400; ++n) input.set_q(0, 0, n, 0, 6);
  input.set_k(0, 0, 100, 0, 12);
  for (const std::string form : {"two_pass", "one_pass"}) {
    const auto mask =
        masks_of("sale:threshold=0.5,block_q=16,block_k=16,local=32,segment=16,dense_below=0,form=" + form, input)[0];
    for (std::int64_t n = 100; n < 400; ++n) ASSERT_TRUE(mask.at(n, 100)) << n;
    // Once it is in the sum nothing else comes near; the anchor alone sets no such bar.
    EXPECT_EQ(mask.at(399, 200), form == "two_pass");
  }
}

TEST(Sale, AConstantAddedToAllKeysChangesNothing) {
  AttentionCase input({.name = "constant", .q_len = 300, .kv_len = 300});
  // Multiples of 1/64, so that adding the constant is exact.
  for (std::int64_t n = 0; n < 300; ++n) {
    for (std::int64_t d = 0; d < 16; ++d) input.set_k(0, 0, n, d, std::nearbyint(input.k(0, 0, n, d) * 64) / 64);
  }
  const std::string spec = "sale:threshold=0.5,block_q=16,block_k=16,local=32,segment=16,dense_below=0";
  const auto before = masks_of(spec, input);
  for (std::int64_t n = 0; n < 300; ++n) {
    for (std::int64_t d = 0; d < 16; ++d) input.set_k(0, 0, n, d, input.k(0, 0, n, d) + static_cast<float>(d - 5));
  }
  EXPECT_TRUE(masks_of(spec, input) == before);
  EXPECT_FALSE(before == test::dense_masks(input));
}

TEST(Sale, BothPhasesAreOneSoftmax) {
  for (const CaseShape& shape : test::all_shapes()) {
    if (!shape.causal) continue;
    const AttentionCase input(shape);
    SCOPED_TRACE(shape.name);
    for (const std::string form : {"two_pass", "one_pass"}) {
      test::expect_attends_its_plan(
          "sale:threshold=0.05,block_q=16,block_k=16,local=32,segment=16,dense_below=0,form=" + form, input,
          shape.dtype == DType::f32 || shape.dtype == DType::f16 ? 2e-4 : 2e-2);
    }
  }
}

TEST(Sale, FullBudgetAndEveryShape) {
  for (const CaseShape& shape : test::all_shapes()) {
    if (!shape.causal) continue;
    const AttentionCase input(shape);
    SCOPED_TRACE(shape.name);
    test::expect_full_budget_is_dense(*make_method("sale"), input);  // short
    test::expect_full_budget_is_dense(*make_method("sale:threshold=0.000009,dense_below=0,local=0"), input);
    test::expect_plans_hold(*make_method("sale:threshold=1,dense_below=0,local=0,block_k=16,segment=16"), input);
    test::expect_plans_hold(*make_method("sale:threshold=0.02,dense_below=0,form=one_pass,local=8"), input);
  }
}

TEST(Sale, UndefinedTokensAreKeptAndBadDataStaysFinite) {
  const std::string spec = "sale:threshold=1,block_q=16,block_k=16,local=16,segment=16,dense_below=0";
  AttentionCase input({.name = "nan", .q_len = 256, .kv_len = 256});
  input.set_k(0, 0, 40, 0, std::nanf(""));
  for (const std::string form : {",form=two_pass", ",form=one_pass"}) {
    for (const auto& mask : masks_of(spec + form, input)) {
      for (std::int64_t n = 96; n < 256; ++n) ASSERT_TRUE(mask.at(n, 40));
    }
    test::expect_finite_on_bad_data(spec + form, 200);
    test::expect_finite_on_bad_data(spec + form, 5);
  }
}

TEST(Sale, BadParametersAndProblemsAreRefused) {
  EXPECT_THROW(make_method("sale:block_k=24"), Error);
  EXPECT_THROW(make_method("sale:block_k=64,segment=96"), Error);
  const AttentionCase input({.name = "both", .q_len = 40, .kv_len = 40, .causal = false});
  EXPECT_THROW(make_method("sale")->plan(input.problem, input.inputs, {}), Error);
}

TEST(Sale, ThresholdsOfHeads) {
  const AttentionCase input({.name = "heads", .q_heads = 4, .kv_heads = 2, .q_len = 300, .kv_len = 300});
  const std::string common = "sale:dense_below=0,local=32,block_q=16,block_k=16,segment=16";
  const std::string path = testing::TempDir() + "sale_thresholds.json";
  std::ofstream(path) << "[[1, 0, 0, 0.2], [0, 0, 0, 0]]";
  const auto method = make_method(common + ",thresholds=" + path);
  const auto masks = masks_of(*method, input);
  const std::vector<std::string> own{"1", "0", "0", "0.2"};
  for (std::size_t head = 0; head < 4; ++head) {
    EXPECT_TRUE(masks[head] == masks_of(common + ",threshold=" + own[head], input)[head]) << head;
  }
  EXPECT_FALSE(masks[0] == test::dense_masks(input)[0]);
  EXPECT_TRUE(masks_of(*method, input, 0, 1) == test::dense_masks(input));
  test::expect_attends_its_plan(common + ",thresholds=" + path, input);
  EXPECT_THROW(masks_of(*method, input, 0, 2), Error);
  std::ofstream(path) << "[[2]]";
  EXPECT_THROW(make_method("sale:thresholds=" + path), Error) << "2 is no share";
  std::filesystem::remove(path);
}

}  // namespace
}  // namespace tessera
