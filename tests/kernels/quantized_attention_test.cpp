// Attention from codes against attention over what they expand to, in float64.
#include "kernels/quantized_attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "kernels/cpu/piece_states.h"
#include "kernels/emulated_levels.h"
#include "kernels/kernel_case.h"

namespace tessera {
namespace {

using Scales = QuantizedScales;

struct Case {
  std::int64_t rows, dim, value_dim;
  QuantizedFormat keys;
  QuantizedFormat values;
  double score_size = 2;  ///< of the queries
};

std::vector<Case> cases() {
  const QuantizedFormat channels{.bits = 4, .scales = Scales::channel};
  const QuantizedFormat separable{.bits = 2, .scales = Scales::token_of_layer, .channel_factors = true};
  std::vector<Case> list{
      {1, 64, 64, channels, separable}, {5, 24, 70, channels, separable}, {4, 7, 130, channels, separable}};
  for (const int bits : {2, 3, 4, 8}) {
    list.push_back({4, 128, 128, {.bits = bits, .scales = Scales::channel}, {.bits = bits, .scales = Scales::token}});
    // Groups, with scales of 16 bits.
    list.push_back({3,
                    80,
                    96,
                    {.bits = bits, .scales = Scales::channel, .group = 32, .scale_dtype = DType::f16},
                    {.bits = bits, .scales = Scales::token, .group = 32, .scale_dtype = DType::bf16}});
    // The unusual sides, with factors along the depth and scales along the lanes.
    list.push_back({2,
                    40,
                    20,
                    {.bits = bits, .scales = Scales::token, .channel_factors = true, .scale_dtype = DType::f16},
                    {.bits = bits, .scales = Scales::channel, .scale_dtype = DType::f32}});
    list.push_back({9, 33, 17, {.bits = bits, .scales = Scales::token}, {.bits = bits, .scales = Scales::channel}});
  }
  return list;
}

/// Keys and values of three heads: one batch, none, many of all lengths.
struct Tokens {
  std::vector<kernels::QuantizedHead> heads;
  std::vector<std::vector<float>> keys, values;  ///< what they expand to
  std::vector<QuantizedStore> stores;

  Tokens(const Case& c, std::mt19937& random, bool constant = false) {
    std::normal_distribution<float> normal;
    for (const auto& lengths :
         std::vector<std::vector<std::int64_t>>{{65}, {}, {1, 16, 17, 63, 64, 100, 130, 2500, 60, 40, 31, 33, 2048}}) {
      stores.emplace_back(QuantizedSide::keys, 1, c.dim, c.keys);
      stores.emplace_back(QuantizedSide::values, 1, c.value_dim, c.values);
      heads.emplace_back();
      keys.emplace_back();
      values.emplace_back();
      for (const std::int64_t length : lengths) {
        for (const bool of_keys : {true, false}) {
          QuantizedStore& store = stores[stores.size() - (of_keys ? 2 : 1)];
          const std::int64_t dim = of_keys ? c.dim : c.value_dim;
          std::vector<float> rows(static_cast<std::size_t>(length * dim));
          for (std::size_t i = 0; i < rows.size(); ++i) {
            rows[i] = constant ? 0.5F : normal(random) * (i % static_cast<std::size_t>(dim) == 3 ? 8.0F : 1.0F) + 0.3F;
          }
          store.append(
              length, [&](std::int64_t, std::int64_t t, float* row) { std::copy_n(rows.data() + t * dim, dim, row); },
              1);
          const auto expanded = store.expand(0, store.batches() - 1);
          auto& all = of_keys ? keys.back() : values.back();
          all.insert(all.end(), expanded.begin(), expanded.end());
        }
      }
      for (std::size_t b = 0; b < lengths.size(); ++b) {
        heads.back().keys.push_back(stores[stores.size() - 2].tiles(0, b));
        heads.back().values.push_back(stores.back().tiles(0, b));
      }
    }
  }
};

/// Output and LSE of one row, in float64.
void expected_row(const Case& c, const float* q, const std::vector<float>& keys, const std::vector<float>& values,
                  std::vector<double>& o, double& lse) {
  o.assign(static_cast<std::size_t>(c.value_dim), 0.0);
  double sum = 0;
  const std::int64_t tokens = std::ssize(keys) / c.dim;
  for (std::int64_t j = 0; j < tokens; ++j) {
    double dot = 0;
    for (std::int64_t d = 0; d < c.dim; ++d)
      dot += double{q[d]} * double{keys[static_cast<std::size_t>(j * c.dim + d)]};
    const double p = std::exp(dot / std::sqrt(static_cast<double>(c.dim)));
    sum += p;
    for (std::size_t d = 0; d < o.size(); ++d) {
      o[d] += p * double{values[static_cast<std::size_t>(j * c.value_dim) + d]};
    }
  }
  for (double& x : o) x = tokens == 0 ? 0.0 : x / sum;
  lse = tokens == 0 ? -std::numeric_limits<double>::infinity() : std::log(sum);
}

TEST(QuantizedAttention, EveryLevelMatchesTheDefinition) {
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  for (const Case& c : cases()) {
    const Tokens tokens(c, random);
    const auto count = std::ssize(tokens.heads) * c.rows;
    std::vector<float> q(static_cast<std::size_t>(count * c.dim));
    for (float& x : q) x = normal(random);
    const kernels::QuantizedProblem problem{c.rows, c.dim, c.value_dim, 1 / std::sqrt(static_cast<float>(c.dim))};
    for (const Isa isa : supported_isas()) {
      std::vector<float> o(static_cast<std::size_t>(count * c.value_dim));
      std::vector<float> lse(static_cast<std::size_t>(count));
      RunOptions options;
      options.isa = isa;
      options.threads = 1;
      kernels::attend_quantized(problem, tokens.heads, q.data(), o.data(), lse.data(), options);
      for (std::int64_t row = 0; row < count; ++row) {
        const auto h = static_cast<std::size_t>(row / c.rows);
        std::vector<double> expected;
        double expected_lse = 0;
        expected_row(c, q.data() + row * c.dim, tokens.keys[h], tokens.values[h], expected, expected_lse);
        if (tokens.keys[h].empty()) {
          EXPECT_EQ(lse[static_cast<std::size_t>(row)], -std::numeric_limits<float>::infinity());
        } else {
          ASSERT_NEAR(lse[static_cast<std::size_t>(row)], expected_lse, 2e-3) << name_of(isa);
        }
        for (std::int64_t d = 0; d < c.value_dim; ++d) {
          // A score is 130 products of codes with coefficients that are off by 2^-16 of the largest.
          ASSERT_NEAR(o[static_cast<std::size_t>(row * c.value_dim + d)], expected[static_cast<std::size_t>(d)], 4e-3)
              << name_of(isa) << ", " << c.keys.bits << " and " << c.values.bits << " bits, row " << row << ", column "
              << d;
        }
      }
      std::vector<float> again(o.size());
      options.threads = 3;
      kernels::attend_quantized(problem, tokens.heads, q.data(), again.data(), lse.data(), options);
      EXPECT_EQ(o, again);
    }
  }
}

/// Products of integers are exact, so that levels differ by the rounding of their scales and exponentials alone.
#ifndef TESSERA_NO_EMULATED_LEVELS
TEST(QuantizedAttention, EmulatedLevelsMatchThePortableOne) {
  if (default_isa() == Isa::portable) GTEST_SKIP() << "emulated vectors need AVX2";
  std::mt19937 random(6);
  std::normal_distribution<float> normal;
  for (const Case& c : cases()) {
    const Tokens tokens(c, random);
    const kernels::QuantizedProblem problem{c.rows, c.dim, c.value_dim, 0.1F};
    const std::int64_t stride = kernels::quantized_query_stride(c.dim);
    std::vector<float> q(static_cast<std::size_t>(c.rows * stride));
    for (std::int64_t row = 0; row < c.rows; ++row) {
      for (std::int64_t d = 0; d < c.dim; ++d) q[static_cast<std::size_t>(row * stride + d)] = 0.3F * normal(random);
    }
    std::vector<std::vector<float>> results;
    for (const auto* level :
         {&kernels::level_portable(), &kernels::emulated_avx512(), &kernels::emulated_avx512_bf16()}) {
      std::vector<float> state(static_cast<std::size_t>(c.rows * (2 + kernels::output_columns(c.value_dim))));
      float* maximum = state.data();
      std::fill_n(maximum, c.rows, -std::numeric_limits<float>::infinity());
      std::vector<std::byte> scratch(kernels::quantized_scratch_bytes(c.dim));
      for (std::size_t batch = 0; batch < 7; ++batch) {
        const QuantizedTiles& keys = tokens.heads[2].keys[batch];
        level->attend_quantized(problem, keys, tokens.heads[2].values[batch], 0, keys.blocks(), q.data(), maximum,
                                maximum + c.rows, maximum + 2 * c.rows, scratch.data());
      }
      results.push_back(std::move(state));
    }
    for (std::size_t i = 0; i < results[0].size(); ++i) {
      const double tolerance = 2e-3 * (1 + std::fabs(results[0][i]));
      ASSERT_NEAR(results[1][i], results[0][i], tolerance) << i;
      ASSERT_NEAR(results[2][i], results[0][i], tolerance) << i;
    }
  }
}
#endif

TEST(QuantizedAttention, ConstantTokensGiveTheirValue) {
  std::mt19937 random(7);
  const Case c{2, 16, 20, {.bits = 2, .scales = Scales::channel}, {.bits = 2, .scales = Scales::token}};
  const Tokens tokens(c, random, true);
  const std::vector<float> q(3 * 2 * 16, 0.7F);
  std::vector<float> o(3 * 2 * 20), lse(6);
  kernels::attend_quantized({2, 16, 20, 0.25F}, tokens.heads, q.data(), o.data(), lse.data(), {});
  for (std::size_t i = 0; i < o.size(); ++i) EXPECT_NEAR(o[i], i / 40 == 1 ? 0.0 : 0.5, 1e-6);
}

TEST(QuantizedAttention, ARowThatIsNotANumberSpoilsNoOther) {
  std::mt19937 random(8);
  std::normal_distribution<float> normal;
  const Case c{4, 32, 32, {.bits = 4, .scales = Scales::channel}, {.bits = 4, .scales = Scales::token}};
  const Tokens tokens(c, random);
  std::vector<float> q(3 * 4 * 32);
  for (float& x : q) x = normal(random);
  std::vector<float> o(q.size()), lse(12), clean(q.size());
  const kernels::QuantizedProblem problem{4, 32, 32, 0.2F};
  kernels::attend_quantized(problem, tokens.heads, q.data(), clean.data(), lse.data(), {});
  q[32 + 5] = std::numeric_limits<float>::quiet_NaN();
  kernels::attend_quantized(problem, tokens.heads, q.data(), o.data(), lse.data(), {});
  for (std::size_t i = 0; i < o.size(); ++i) {
    if (i / 32 == 1) {
      EXPECT_TRUE(std::isnan(o[i]));
    } else {
      EXPECT_EQ(o[i], clean[i]);
    }
  }
  EXPECT_TRUE(std::isnan(lse[1]));
}

}  // namespace
}  // namespace tessera
