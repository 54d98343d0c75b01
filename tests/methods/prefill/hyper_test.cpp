// HyperAttention: the recursion, sorted blocks and sampled keys written out in float64, and what follows from them.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>
#include <random>

#include "methods/diffusion/pooled_reference.h"
#include "methods/masks.h"
#include "score/angular_lsh.h"

namespace tessera {
namespace {

using test::AttentionCase;
using test::CaseShape;
using test::Result;

struct Settings {
  std::int64_t min_seq_len = 20;
  std::int64_t block = 8;
  std::int64_t samples = 6;
  std::int64_t planes = 4;
  std::int64_t seed = 3;
  bool legacy = false;

  std::string spec() const {
    return fmt::format("hyper:min_seq_len={},block={},samples={},planes={},seed={},legacy_buckets={}", min_seq_len,
                       block, samples, planes, seed, legacy);
  }
};

/// The reflected list of codes, as the text builds it.
std::vector<std::int32_t> reflected(std::int64_t planes) {
  std::vector<std::int32_t> codes{0, 1};
  for (std::int64_t r = 1; r < planes; ++r) {
    std::vector<std::int32_t> back(codes.rbegin(), codes.rend());
    for (const std::int32_t code : back) codes.push_back(code + (1 << r));
  }
  return codes;
}

/// Keys of every query of one head with their weights, by the text. A key may come twice: exact in its block, and
/// sampled.
class Weights {
 public:
  /// [query][key]: sum of the weights of the key's copies; `raw` of those that are no samples.
  std::vector<std::vector<double>> all;
  std::vector<std::vector<double>> raw;

  Weights(const AttentionCase& input, const Settings& settings, std::int64_t s, std::int64_t head)
      : input_(input),
        settings_(settings),
        s_(s),
        head_(head),
        hash_(input.problem.head_dim, settings.planes, static_cast<std::uint64_t>(settings.seed)) {
    const Problem& problem = input.problem;
    // Rectangles are numbered over all sequences.
    for (std::int64_t other = 0; other <= s; ++other) {
      active_ = other == s;
      const std::int64_t queries = problem.q_len_of(other);
      const std::int64_t keys = problem.kv_len_of(other);
      if (active_) {
        all.assign(static_cast<std::size_t>(queries), std::vector<double>(static_cast<std::size_t>(keys), 0.0));
        raw = all;
      }
      offset_ = problem.q_offset_of(other);
      if (!problem.causal) {
        rectangle(0, queries, 0, keys);
        continue;
      }
      const std::int64_t first = std::min(queries, std::max<std::int64_t>(0, -offset_));
      const std::int64_t prefix = std::min(keys, std::max<std::int64_t>(0, offset_));
      const std::int64_t beyond = std::min(queries, std::max(first, keys - offset_));
      square(first, beyond, prefix);
      rectangle(first, queries, 0, prefix);
      rectangle(beyond, queries, prefix, keys);
    }
  }

 private:
  void exact(std::int64_t q0, std::int64_t q1, std::int64_t k0, std::int64_t k1, bool causal) {
    for (std::int64_t r = q0; active_ && r < q1; ++r) {
      for (std::int64_t j = k0; j < k1 && (!causal || j <= offset_ + r); ++j) {
        all[r][j] += 1;
        raw[r][j] += 1;
      }
    }
  }
  void square(std::int64_t q0, std::int64_t q1, std::int64_t k0) {
    const std::int64_t n = q1 - q0;
    if (n <= settings_.min_seq_len) return exact(q0, q1, k0, k0 + n, true);
    const std::int64_t half = (n + 1) / 2;
    square(q0, q0 + half, k0);
    square(q0 + half, q1, k0 + half);
    rectangle(q0 + half, q1, k0, k0 + half);
  }
  void rectangle(std::int64_t q0, std::int64_t q1, std::int64_t k0, std::int64_t k1) {
    if (q1 <= q0 || k1 <= k0) return;
    if (q1 - q0 < settings_.min_seq_len) return exact(q0, q1, k0, k1, false);
    const std::int64_t number = number_++;
    if (!active_) return;
    const std::int64_t m = k1 - k0;
    const std::int64_t blocks = (m + settings_.block - 1) / settings_.block;
    const std::int64_t rows = (q1 - q0 + blocks - 1) / blocks;
    const auto queries = sorted(q0, q1, true);
    const auto keys = sorted(k0, k1, false);
    std::seed_seq mix{settings_.seed, std::int64_t{0}, head_, number};
    std::mt19937_64 random(mix);
    std::vector<std::int64_t> samples;
    for (std::int64_t i = 0; i < settings_.samples; ++i) {
      samples.push_back(static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(m)));
    }
    for (std::size_t i = 0; i < queries.size(); ++i) {
      const std::int64_t block = static_cast<std::int64_t>(i) / rows;
      for (std::int64_t p = block * settings_.block; p < std::min(m, (block + 1) * settings_.block); ++p) {
        all[queries[i]][keys[p]] += 1;
        raw[queries[i]][keys[p]] += 1;
      }
      for (const std::int64_t p : samples) {
        if (p / settings_.block == block) continue;
        all[queries[i]][keys[p]] += static_cast<double>(m) / static_cast<double>(settings_.samples);
      }
    }
  }
  /// Rows [first, end) by bucket.
  std::vector<std::int64_t> sorted(std::int64_t first, std::int64_t end, bool query) const {
    const std::vector<std::int32_t> codes = reflected(settings_.planes);
    std::vector<std::pair<std::int64_t, std::int64_t>> order;
    for (std::int64_t n = first; n < end; ++n) {
      std::vector<float> row;
      for (std::int64_t d = 0; d < input_.problem.head_dim; ++d) {
        row.push_back(query ? input_.q(s_, head_, n, d) : input_.k(s_, head_ / input_.problem.group(), n, d));
      }
      std::int32_t code = 0;
      hash_.codes(row, {&code, 1});
      const auto rank = std::find(codes.begin(), codes.end(), code) - codes.begin();
      order.emplace_back(settings_.legacy ? codes[code] : rank, n);
    }
    std::sort(order.begin(), order.end());
    std::vector<std::int64_t> rows;
    rows.reserve(order.size());
    for (const auto& [bucket, n] : order) rows.push_back(n);
    return rows;
  }

  const AttentionCase& input_;
  Settings settings_;
  std::int64_t s_;
  std::int64_t head_;
  score::AngularHash hash_;
  bool active_ = false;
  std::int64_t offset_ = 0;
  std::int64_t number_ = 0;
};

void expect_formula(const AttentionCase& input, const Settings& settings, double tolerance) {
  const Problem& problem = input.problem;
  const auto method = make_method(settings.spec());
  const Result result = test::attend(*method, input, KernelKind::automatic, 1);
  const auto mask = dense_mask(result.plan);
  for (std::int64_t s = 0; s < problem.batch; ++s) {
    for (std::int64_t h = 0; h < problem.q_heads; ++h) {
      const Weights weights(input, settings, s, h);
      const test::HeadMask pairs = test::head_mask(result.plan, mask, s, h);
      for (std::int64_t n = 0; n < problem.q_len_of(s); ++n) {
        double sum = 0;
        std::vector<double> expected(static_cast<std::size_t>(problem.value_dim), 0.0);
        for (std::int64_t j = 0; j < problem.kv_len_of(s); ++j) {
          ASSERT_EQ(pairs.at(n, j), weights.raw[n][j] > 0) << "head " << h << ", query " << n << ", key " << j;
          ASSERT_LE(weights.raw[n][j], 1) << "counted twice";
          if (weights.all[n][j] == 0) continue;
          double dot = 0;
          for (std::int64_t d = 0; d < problem.head_dim; ++d) {
            dot += static_cast<double>(input.q(s, h, n, d)) * input.k(s, h / problem.group(), j, d);
          }
          const double weight = std::exp(dot * problem.softmax_scale()) * weights.all[n][j];
          sum += weight;
          for (std::int64_t d = 0; d < problem.value_dim; ++d) {
            expected[d] += weight * input.v(s, h / problem.group(), j, d);
          }
        }
        const std::int64_t row = test::output_row(problem, s, h, n);
        if (sum == 0) {
          ASSERT_EQ(result.lse[row], -std::numeric_limits<float>::infinity());
          continue;
        }
        ASSERT_NEAR(result.lse[row], std::log(sum), tolerance) << "sequence " << s << ", head " << h << ", query " << n;
        for (std::int64_t d = 0; d < problem.value_dim; ++d) {
          ASSERT_NEAR(result.o[row * problem.value_dim + d], expected[d] / sum, tolerance);
        }
      }
    }
  }
  if (settings.min_seq_len >= 20) {
    EXPECT_EQ(result.o, test::attend(*method, input).o);
  }
}

TEST(Hyper, FollowsTheTextForEveryKindOfInput) {
  for (const CaseShape& shape : test::all_shapes()) {
    SCOPED_TRACE(shape.name);
    const AttentionCase input(shape);
    const double tolerance = shape.dtype == DType::bf16 ? 4e-2 : shape.dtype == DType::f16 ? 6e-3 : 3e-4;
    expect_formula(input, {}, tolerance);
  }
}

TEST(Hyper, FollowsTheTextForOtherSettings) {
  for (const CaseShape& shape : {CaseShape{.name = "odd", .q_heads = 4, .kv_heads = 2, .q_len = 301, .kv_len = 301},
                                 CaseShape{.name = "wide", .q_heads = 2, .q_len = 130, .kv_len = 400},
                                 CaseShape{.name = "both", .q_len = 150, .kv_len = 90, .causal = false}}) {
    SCOPED_TRACE(shape.name);
    const AttentionCase input(shape);
    for (const Settings& settings :
         {Settings{.min_seq_len = 7, .block = 5, .samples = 3}, Settings{.min_seq_len = 40, .block = 33, .samples = 50},
          Settings{.min_seq_len = 64, .block = 16, .samples = 0}, Settings{.planes = 1},
          Settings{.planes = 6, .legacy = true}}) {
      expect_formula(input, settings, 3e-4);
    }
  }
}

void expect_dense_output(const AttentionCase& input, const std::string& spec) {
  const Result dense = test::attend(*make_method("dense"), input, KernelKind::automatic, 1);
  const Result result = test::attend(*make_method(spec), input, KernelKind::automatic, 1);
  for (std::size_t i = 0; i < dense.o.size(); ++i) ASSERT_NEAR(result.o[i], dense.o[i], 1e-5) << spec;
}

TEST(Hyper, LongBlocksAndShortSequencesAreExact) {
  for (const CaseShape& shape : test::all_shapes()) {
    if (shape.dtype != DType::f32) continue;
    SCOPED_TRACE(shape.name);
    const AttentionCase input(shape);
    expect_dense_output(input, "hyper:min_seq_len=10,block=500,samples=0");
    expect_dense_output(input, "hyper:min_seq_len=10,block=500,samples=20");
    test::expect_full_budget_is_dense(*make_method("hyper"), input);
    test::expect_full_budget_is_dense(*make_method("hyper:min_seq_len=10,layers=3+5"), input);
    test::expect_plans_hold(*make_method("hyper:min_seq_len=10,block=7,samples=5"), input);
  }
}

TEST(Hyper, SamplesEstimateTheDenominatorWithoutBias) {
  const AttentionCase input({.name = "bias", .q_heads = 1, .q_len = 40, .kv_len = 120, .causal = false});
  const Result dense = test::attend(*make_method("dense"), input);
  std::vector<double> mean(40, 0.0);
  constexpr int seeds = 400;
  for (int seed = 0; seed < seeds; ++seed) {
    // planes of one seed each: the blocks differ too, and every one of them leaves its rest to the samples.
    const Result result =
        test::attend(*make_method(fmt::format("hyper:min_seq_len=1,block=16,samples=24,seed={}", seed)), input,
                     KernelKind::automatic, 1);
    for (std::size_t n = 0; n < mean.size(); ++n) mean[n] += std::exp(result.lse[n] - dense.lse[n]) / seeds;
  }
  double total = 0;
  for (const double x : mean) {
    EXPECT_NEAR(x, 1, 0.3);
    total += x / 40;
  }
  EXPECT_NEAR(total, 1, 0.03);
}

TEST(Hyper, BucketsOfNeighboursDifferInOneBit) {
  for (const std::int64_t planes : {1, 3, 7, 10}) {
    const std::vector<std::int32_t> codes = reflected(planes);
    for (std::int32_t i = 0; i < static_cast<std::int32_t>(codes.size()); ++i) {
      ASSERT_EQ(score::gray_code(i), codes[i]);
      ASSERT_EQ(score::gray_rank(codes[i]), i);
      if (i > 0) {
        ASSERT_EQ(std::popcount(static_cast<std::uint32_t>(codes[i] ^ codes[i - 1])), 1);
      }
    }
  }
}

TEST(Hyper, EqualVectorsShareABucketAndCloseOnesMostly) {
  const score::AngularHash hash(16, 7, 0);
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::int64_t close = 0;
  std::int64_t far = 0;
  for (int trial = 0; trial < 300; ++trial) {
    std::vector<float> rows(64);
    for (std::size_t d = 0; d < 16; ++d) {
      rows[d] = normal(random);
      rows[16 + d] = 2.5F * rows[d];
      rows[32 + d] = rows[d] + 0.05F * normal(random);
      rows[48 + d] = normal(random);
    }
    std::vector<std::int32_t> codes(4);
    hash.codes(rows, codes);
    ASSERT_EQ(codes[0], codes[1]) << "the length of a vector does not matter";
    close += codes[0] == codes[2] ? 1 : 0;
    far += codes[0] == codes[3] ? 1 : 0;
  }
  EXPECT_GT(close, 240);
  EXPECT_LT(far, 30);
}

TEST(Hyper, GradientsMatchDifferences) {
  const CaseShape shape{.name = "gradient", .q_heads = 2, .kv_heads = 1, .q_len = 60, .kv_len = 72, .head_dim = 8};
  const std::string spec = "hyper:min_seq_len=12,block=8,samples=5,planes=3";
  const auto method = make_method(spec);
  ASSERT_TRUE(method->info().phases.backward);
  AttentionCase input(shape);
  const Problem& problem = input.problem;
  const Result forward = test::attend(*method, input);
  std::mt19937 random(9);
  std::normal_distribution<float> normal;
  std::vector<float> d_o(forward.o.size());
  std::vector<float> d_lse(forward.lse.size());
  for (float& x : d_o) x = normal(random);
  for (float& x : d_lse) x = normal(random);
  const auto loss = [&](const AttentionCase& at) {
    const Result result = test::attend(*method, at, KernelKind::automatic, 1);
    double sum = 0;
    for (std::size_t i = 0; i < d_o.size(); ++i) sum += static_cast<double>(d_o[i]) * result.o[i];
    for (std::size_t i = 0; i < d_lse.size(); ++i) sum += static_cast<double>(d_lse[i]) * result.lse[i];
    return sum;
  };
  std::vector<float> d_q(2 * 60 * 8);
  std::vector<float> d_k(72 * 8);
  std::vector<float> d_v(72 * 8);
  const SavedForward saved{view_of(forward.o.data(), DType::f32, {1, 2, 60, 8}), forward.lse,
                           view_of(d_o.data(), DType::f32, {1, 2, 60, 8}), d_lse};
  Gradients gradients;
  gradients.d_q = mutable_view_of(d_q.data(), DType::f32, {1, 2, 60, 8});
  gradients.d_k = mutable_view_of(d_k.data(), DType::f32, {1, 1, 72, 8});
  gradients.d_v = mutable_view_of(d_v.data(), DType::f32, {1, 1, 72, 8});
  method->backward(problem, input.inputs, saved, gradients, {});

  constexpr float step = 4e-3F;
  std::int64_t hash_moved = 0;
  const auto expect_derivative = [&](bool query, std::int64_t h, std::int64_t n, std::int64_t d, double expected) {
    AttentionCase up(shape);
    AttentionCase down(shape);
    const float x = query ? input.q(0, h, n, d) : input.k(0, h, n, d);
    if (query) {
      up.set_q(0, h, n, d, x + step);
      down.set_q(0, h, n, d, x - step);
    } else {
      up.set_k(0, h, n, d, x + step);
      down.set_k(0, h, n, d, x - step);
    }
    if (!(method->plan(problem, up.inputs, {}) == method->plan(problem, down.inputs, {}))) {
      ++hash_moved;  // another bucket: not differentiable there
      return;
    }
    EXPECT_NEAR((loss(up) - loss(down)) / (2 * step), expected, 0.02 * (1 + std::fabs(expected)))
        << (query ? "query " : "key ") << h << " " << n << " " << d;
  };
  for (std::int64_t n = 1; n < 60; n += 7) expect_derivative(true, n % 2, n, n % 8, d_q[(n % 2 * 60 + n) * 8 + n % 8]);
  for (std::int64_t n = 0; n < 72; n += 5) expect_derivative(false, 0, n, n % 8, d_k[n * 8 + n % 8]);
  EXPECT_LT(hash_moved, 6);
  // dV is linear: sum over keys of dV . V = sum over rows of dO . O.
  double left = 0;
  double right = 0;
  for (std::int64_t j = 0; j < 72; ++j) {
    for (std::int64_t d = 0; d < 8; ++d) left += static_cast<double>(d_v[j * 8 + d]) * input.v(0, 0, j, d);
  }
  for (std::size_t i = 0; i < d_o.size(); ++i) right += static_cast<double>(d_o[i]) * forward.o[i];
  EXPECT_NEAR(left, right, 1e-3 * std::fabs(right) + 1e-3);
}

TEST(Hyper, OddInputsStayCorrect) {
  // Equal keys share one bucket; huge logits have one winner. Nothing becomes NaN.
  for (const float size : {0.0F, 1.0F, 3e4F}) {
    AttentionCase input({.name = "plain", .q_heads = 2, .q_len = 260, .kv_len = 260});
    for (std::int64_t n = 0; n < 260; ++n) {
      for (std::int64_t d = 0; d < 16; ++d) input.set_k(0, 0, n, d, size == 3e4F ? (n == 40 ? size : 0.0F) : size);
    }
    const Result result = test::attend(*make_method("hyper:min_seq_len=30,block=16,samples=8"), input);
    for (const float x : result.o) ASSERT_TRUE(std::isfinite(x)) << size;
    for (const float x : result.lse) ASSERT_TRUE(std::isfinite(x)) << size;
  }
}

TEST(Hyper, RefusesWhatItsPartsCannotSay) {
  AttentionCase input({.name = "alibi", .q_len = 100, .kv_len = 100});
  const std::vector<float> slopes{0.1F, 0.2F};
  input.inputs.modifiers.alibi_slopes = slopes;
  EXPECT_THROW(test::attend(*make_method("hyper:min_seq_len=10"), input), Error);
  EXPECT_NO_THROW(test::attend(*make_method("hyper"), input)) << "exact below min_seq_len";
  EXPECT_THROW(make_method("hyper:planes=0"), Error);
  EXPECT_THROW(make_method("hyper:layers=x"), Error);
}

}  // namespace
}  // namespace tessera
