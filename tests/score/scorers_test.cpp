// Scorers against plain float64 evaluations of their definitions, over all kinds of inputs.
#include <gtest/gtest.h>

#include <cmath>

#include "score/attention_case.h"
#include "score/exponential.h"
#include "score/pooled_tiles.h"
#include "score/row_access.h"
#include "score/row_probe.h"
#include "score/tile_mass.h"

namespace tessera::score {
namespace {

using test::AttentionCase;
using test::CaseShape;

class Scorers : public testing::TestWithParam<CaseShape> {};

std::vector<float> masses(const AttentionCase& input, std::int64_t s, std::int64_t h, const TileMassOptions& options) {
  const QueryTiles tiles(input.problem, s, options.tile_q, options.tile_k);
  std::vector<float> mass(static_cast<std::size_t>(tiles.count() * tiles.key_tiles()));
  TileMassBuffers buffers;
  const std::int64_t band = 2;  // smaller than the default: bands must join without a seam
  for (std::int64_t first = 0; first < tiles.count(); first += band) {
    const std::int64_t count = std::min(band, tiles.count() - first);
    tile_mass(input.problem, input.inputs, s, h, options, first, count,
              std::span(mass).subspan(static_cast<std::size_t>(first * tiles.key_tiles()),
                                      static_cast<std::size_t>(count * tiles.key_tiles())),
              buffers);
  }
  return mass;
}

TEST_P(Scorers, StrideOneIsTheExactTileMass) {
  const AttentionCase input(GetParam());
  for (std::int64_t s = 0; s < input.problem.batch; ++s) {
    for (std::int64_t h = 0; h < input.problem.q_heads; ++h) {
      const TileMassOptions options{.tile_q = 32, .tile_k = 48, .stride = 1, .scale = input.problem.softmax_scale()};
      const QueryTiles tiles(input.problem, s, 32, 48);
      std::vector<double> expected(static_cast<std::size_t>(tiles.count() * tiles.key_tiles()), 0.0);
      for (std::int64_t n = 0; n < tiles.queries; ++n) {
        const auto p = input.probabilities(s, h, n);
        for (std::int64_t j = 0; j < tiles.keys; ++j) expected[n / 32 * tiles.key_tiles() + j / 48] += p[j];
      }
      const auto mass = masses(input, s, h, options);
      for (std::size_t i = 0; i < mass.size(); ++i) ASSERT_NEAR(mass[i], expected[i], 2e-4) << "entry " << i;
    }
  }
}

/// The definition of the antidiagonal score, by sums over pairs.
std::vector<double> antidiagonal(const AttentionCase& input, std::int64_t s, std::int64_t h, std::int64_t tile,
                                 std::int64_t stride) {
  const QueryTiles tiles(input.problem, s, tile, tile);
  const std::int64_t kv = h / input.problem.group();
  const std::int64_t q_groups = (tiles.queries + stride - 1) / stride;
  const std::int64_t k_groups = (tiles.keys + stride - 1) / stride;
  std::vector<double> expected(static_cast<std::size_t>(tiles.count() * tiles.key_tiles()), 0.0);
  for (std::int64_t m = 0; m < q_groups; ++m) {
    std::vector<double> x;
    for (std::int64_t n = 0; n < k_groups; ++n) {
      if (tiles.causal && n * stride > tiles.offset + m * stride + stride - 1) break;
      double sum = 0;
      for (std::int64_t i = 0; i < stride; ++i) {
        const std::int64_t query = m * stride + stride - 1 - i;
        const std::int64_t key = n * stride + i;
        if (query >= tiles.queries || key >= tiles.keys) continue;
        for (std::int64_t d = 0; d < input.problem.head_dim; ++d) {
          sum += static_cast<double>(input.q(s, h, query, d)) * input.k(s, kv, key, d);
        }
      }
      x.push_back(sum * input.problem.softmax_scale() / static_cast<double>(stride));
    }
    if (x.empty()) continue;
    const double maximum = *std::max_element(x.begin(), x.end());
    double total = 0;
    for (double& value : x) total += value = std::exp(value - maximum);
    for (std::size_t n = 0; n < x.size(); ++n) {
      expected[m * stride / tile * tiles.key_tiles() + static_cast<std::int64_t>(n) * stride / tile] += x[n] / total;
    }
  }
  return expected;
}

TEST_P(Scorers, StridedMassIsTheAntidiagonalScore) {
  const AttentionCase input(GetParam());
  for (const std::int64_t stride : {4, 16}) {
    for (std::int64_t s = 0; s < input.problem.batch; ++s) {
      const TileMassOptions options{.tile_q = 64,
                                    .tile_k = 64,
                                    .stride = stride,
                                    .scale = input.problem.softmax_scale() / static_cast<float>(stride)};
      const std::int64_t h = input.problem.q_heads - 1;
      const auto expected = antidiagonal(input, s, h, 64, stride);
      const auto mass = masses(input, s, h, options);
      ASSERT_EQ(mass.size(), expected.size());
      for (std::size_t i = 0; i < mass.size(); ++i) ASSERT_NEAR(mass[i], expected[i], 1e-4) << "entry " << i;
    }
  }
}

TEST_P(Scorers, ProbeSumsColumnsAndDiagonals) {
  const AttentionCase input(GetParam());
  for (std::int64_t s = 0; s < input.problem.batch; ++s) {
    const std::int64_t queries = input.problem.q_len_of(s);
    const std::int64_t rows = std::min<std::int64_t>(64, queries);
    const std::int64_t h = input.problem.q_heads - 1;
    LineScores lines;
    ProbeBuffers buffers;
    probe_rows(input.problem, input.inputs, s, h, queries - rows, rows, true, lines, buffers);
    std::vector<double> columns(lines.columns.size(), 0.0);
    std::vector<double> offsets(lines.offsets.size(), 0.0);
    for (std::int64_t n = queries - rows; n < queries; ++n) {
      const auto p = input.probabilities(s, h, n);
      for (std::size_t j = 0; j < p.size(); ++j) {
        columns[j] += p[j];
        const std::int64_t offset = input.problem.q_offset_of(s) + n - static_cast<std::int64_t>(j);
        if (offset >= 0 && p[j] > 0) offsets.at(static_cast<std::size_t>(offset)) += p[j];
      }
    }
    for (std::size_t j = 0; j < columns.size(); ++j) ASSERT_NEAR(lines.columns[j], columns[j], 2e-4) << "key " << j;
    for (std::size_t o = 0; o < offsets.size(); ++o) ASSERT_NEAR(lines.offsets[o], offsets[o], 2e-4) << "offset " << o;
  }
}

TEST_P(Scorers, PooledTilesAreMeans) {
  const AttentionCase input(GetParam());
  const std::int64_t dim = input.problem.head_dim;
  for (std::int64_t s = 0; s < input.problem.batch; ++s) {
    const std::int64_t keys = input.problem.kv_len_of(s);
    const auto real = pool_keys(input.problem, input.inputs, s, input.problem.kv_heads - 1, 64, LastTile::real_rows);
    const auto padded =
        pool_keys(input.problem, input.inputs, s, input.problem.kv_heads - 1, 64, LastTile::padded_rows);
    ASSERT_EQ(static_cast<std::int64_t>(real.size()), (keys + 63) / 64 * dim);
    for (std::int64_t t = 0; t * 64 < keys; ++t) {
      const std::int64_t count = std::min<std::int64_t>(64, keys - t * 64);
      for (std::int64_t d = 0; d < dim; ++d) {
        double sum = 0;
        for (std::int64_t j = t * 64; j < t * 64 + count; ++j) sum += input.k(s, input.problem.kv_heads - 1, j, d);
        ASSERT_NEAR(real[t * dim + d], sum / static_cast<double>(count), 1e-5);
        ASSERT_NEAR(padded[t * dim + d], sum / 64, 1e-5);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, Scorers, testing::ValuesIn(test::all_shapes()),
                         [](const auto& shape) { return shape.param.name; });

TEST(TileMass, ManyPanelsAndHotTilesStayNormalised) {
  AttentionCase input({.name = "long", .q_heads = 1, .q_len = 1500, .kv_len = 1500});
  for (std::int64_t d = 0; d < 16; ++d) input.set_k(0, 0, 3, d, 1000.0F * input.q(0, 0, 1400, d));
  const TileMassOptions options{.tile_q = 64, .tile_k = 64, .stride = 1, .scale = 0.25F};
  const auto mass = masses(input, 0, 0, options);
  const std::int64_t key_tiles = 24;
  for (std::int64_t t = 0; t < 24; ++t) {
    double sum = 0;
    for (std::int64_t j = 0; j < key_tiles; ++j) sum += mass[t * key_tiles + j];
    EXPECT_NEAR(sum, t == 23 ? 1500 - 23 * 64 : 64, 1e-2) << "tile " << t;
  }
}

TEST(TileMass, UndefinedScoresMakeTheTilesTheirRowsSeeUndefined) {
  AttentionCase input({.name = "nan", .q_heads = 1, .q_len = 256, .kv_len = 256});
  input.set_k(0, 0, 150, 0, std::numeric_limits<float>::quiet_NaN());
  const TileMassOptions options{.tile_q = 64, .tile_k = 64, .stride = 1, .scale = 0.25F};
  const auto mass = masses(input, 0, 0, options);
  for (int j = 0; j < 4; ++j) {
    EXPECT_FALSE(std::isnan(mass[1 * 4 + j])) << "rows before the key are not touched";
    EXPECT_EQ(std::isnan(mass[3 * 4 + j]), true);
  }
  EXPECT_FALSE(std::isnan(mass[2 * 4 + 3])) << "invisible tiles stay 0";
}

TEST(Exponential, IsAccurateAndTotal) {
  for (float x = -87.0F; x <= 0; x += 0.0137F) {
    ASSERT_NEAR(exponential(x) / std::exp(static_cast<double>(x)), 1.0, 3e-7) << x;
  }
  EXPECT_EQ(exponential(0.0F), 1.0F);
  EXPECT_EQ(exponential(-87.5F), 0.0F);
  EXPECT_EQ(exponential(-std::numeric_limits<float>::infinity()), 0.0F);
  EXPECT_EQ(exponential(-1e30F), 0.0F);
  EXPECT_TRUE(std::isnan(exponential(std::numeric_limits<float>::quiet_NaN())));
}

}  // namespace
}  // namespace tessera::score
