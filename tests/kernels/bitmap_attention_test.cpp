// Attention from bitmaps against attention over what they expand to, in float64.
#include "kernels/bitmap_attention.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "kernels/kernel_case.h"

namespace tessera {
namespace {

struct Head {
  BitmapStore keys;
  BitmapStore values;
};

TEST(BitmapAttention, EveryLevelMatchesTheDefinition) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  const auto number = [&](double share) {
    return std::uniform_real_distribution<double>()(random) < share ? normal(random) : 0.0F;
  };
  struct Shape {
    std::int64_t rows, dim, value_dim;
    DType dtype;
  };
  for (const Shape& shape : {Shape{1, 64, 64, DType::bf16}, Shape{4, 128, 128, DType::f16},
                             Shape{5, 24, 70, DType::f32}, Shape{9, 7, 130, DType::bf16}}) {
    for (const double share : {0.05, 0.3, 1.0}) {
      std::vector<Head> heads;
      std::vector<std::vector<float>> keys, values;
      // Batches of several sizes, enough of them for several pieces, and a head without tokens.
      for (const std::int64_t batches : {1, 0, 11}) {
        heads.push_back({{BitmapStore::Orientation::keys, shape.dim, shape.dtype},
                         {BitmapStore::Orientation::values, shape.value_dim, shape.dtype}});
        keys.emplace_back();
        values.emplace_back();
        for (std::int64_t b = 0; b < batches; ++b) {
          const std::int64_t groups = b % 3 + 3;
          std::vector<float> k(static_cast<std::size_t>(groups * 64 * shape.dim));
          std::vector<float> v(static_cast<std::size_t>(groups * 64 * shape.value_dim));
          for (float& x : k) x = number(share);
          for (float& x : v) x = number(share);
          heads.back().keys.append(groups, k.data());
          heads.back().values.append(groups, v.data());
          for (const float x : heads.back().keys.expand(static_cast<std::size_t>(b))) keys.back().push_back(x);
          for (const float x : heads.back().values.expand(static_cast<std::size_t>(b))) values.back().push_back(x);
        }
      }
      std::vector<kernels::BitmapHead> tiles(heads.size());
      for (std::size_t h = 0; h < heads.size(); ++h) {
        for (std::size_t b = 0; b < heads[h].keys.batches(); ++b) {
          tiles[h].keys.push_back(heads[h].keys.tiles(b));
          tiles[h].values.push_back(heads[h].values.tiles(b));
        }
      }
      const auto count = static_cast<std::int64_t>(heads.size()) * shape.rows;
      std::vector<float> q(static_cast<std::size_t>(count * shape.dim));
      for (float& x : q) x = 2 * normal(random);
      const kernels::BitmapProblem problem{shape.rows, shape.dim, shape.value_dim,
                                           1 / std::sqrt(static_cast<float>(shape.dim)), shape.dtype};
      for (const Isa isa : supported_isas()) {
        std::vector<float> o(static_cast<std::size_t>(count * shape.value_dim));
        std::vector<float> lse(static_cast<std::size_t>(count));
        RunOptions options;
        options.isa = isa;
        options.threads = 1;
        kernels::attend_bitmap(problem, tiles, q.data(), o.data(), lse.data(), options);
        for (std::int64_t row = 0; row < count; ++row) {
          const auto h = static_cast<std::size_t>(row / shape.rows);
          const auto tokens = static_cast<std::int64_t>(keys[h].size()) / shape.dim;
          double sum = 0;
          std::vector<double> expected(static_cast<std::size_t>(shape.value_dim), 0.0);
          for (std::int64_t j = 0; j < tokens; ++j) {
            double dot = 0;
            for (std::int64_t d = 0; d < shape.dim; ++d) {
              dot += static_cast<double>(q[static_cast<std::size_t>(row * shape.dim + d)]) *
                     keys[h][static_cast<std::size_t>(j * shape.dim + d)];
            }
            const double p = std::exp(dot * problem.scale);
            sum += p;
            for (std::int64_t d = 0; d < shape.value_dim; ++d) {
              expected[static_cast<std::size_t>(d)] += p * values[h][static_cast<std::size_t>(j * shape.value_dim + d)];
            }
          }
          if (tokens == 0) {
            EXPECT_EQ(lse[static_cast<std::size_t>(row)], -std::numeric_limits<float>::infinity());
          } else {
            ASSERT_NEAR(lse[static_cast<std::size_t>(row)], std::log(sum), 2e-5) << name_of(isa);
          }
          for (std::int64_t d = 0; d < shape.value_dim; ++d) {
            const double value = tokens == 0 ? 0.0 : expected[static_cast<std::size_t>(d)] / sum;
            ASSERT_NEAR(o[static_cast<std::size_t>(row * shape.value_dim + d)], value, 2e-5)
                << name_of(isa) << " row " << row << " of " << shape.rows << ", column " << d;
          }
        }
        std::vector<float> again(o.size());
        options.threads = 3;
        kernels::attend_bitmap(problem, tiles, q.data(), again.data(), lse.data(), options);
        EXPECT_EQ(o, again);
      }
    }
  }
}

}  // namespace
}  // namespace tessera
