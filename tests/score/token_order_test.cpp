// Orders of grid tokens: every cell once, and neighbours side by side.
#include "score/token_order.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <numeric>

namespace tessera::score {
namespace {

bool is_permutation_of(std::vector<std::int32_t> order, std::int64_t cells) {
  std::sort(order.begin(), order.end());
  return static_cast<std::int64_t>(order.size()) == cells && is_identity(order);
}

TEST(TokenOrder, TilesAreBoxesInRasterOrder) {
  const GridTiling tiling({2, 3, 4}, {1, 2, 2});
  const std::vector<std::int32_t> order = tiling.order();
  const std::vector<std::int32_t> first_frame{0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 10, 11};
  EXPECT_TRUE(std::equal(first_frame.begin(), first_frame.end(), order.begin()));
  EXPECT_TRUE(is_permutation_of(order, 24));
  EXPECT_EQ(tiling.tiles().size(), 8U);
  EXPECT_EQ(tiling.tiles()[2].cells, 2);  // the ragged last row of tiles
}

TEST(TokenOrder, DilationGroupsComeFirst) {
  const GridTiling tiling({1, 1, 7}, {1, 1, 2}, {1, 1, 3});
  EXPECT_EQ(tiling.order(), (std::vector<std::int32_t>{0, 3, 6, 1, 4, 2, 5}));
  EXPECT_EQ(tiling.first_tile_of({0, 0, 1}), 2);
  EXPECT_EQ(tiling.counts_of({0, 0, 0}), (Extent{1, 1, 2}));
}

TEST(TokenOrder, TilesCoverEveryCellOnce) {
  for (const Extent& extent : {Extent{1, 1, 1}, Extent{3, 5, 7}, Extent{4, 1, 6}}) {
    for (const Extent& tile : {Extent{1, 1, 1}, Extent{2, 2, 2}, Extent{9, 9, 9}}) {
      for (const Extent& dilation : {Extent{1, 1, 1}, Extent{2, 1, 3}, Extent{9, 9, 9}}) {
        EXPECT_TRUE(is_permutation_of(GridTiling(extent, tile, dilation).order(), extent[0] * extent[1] * extent[2]));
      }
    }
  }
}

TEST(TokenOrder, AxesNest) {
  EXPECT_TRUE(is_identity(axis_order({2, 3, 4}, {0, 1, 2})));
  const auto frames_innermost = axis_order({2, 3, 4}, {1, 2, 0});
  EXPECT_EQ(frames_innermost[1], 12);
  EXPECT_EQ(frames_innermost[2], 1);
  EXPECT_TRUE(is_permutation_of(frames_innermost, 24));
}

TEST(TokenOrder, GilbertCurveIsConnected) {
  for (const Extent& extent : {Extent{1, 1, 1}, Extent{1, 1, 9}, Extent{1, 8, 8}, Extent{4, 6, 8}, Extent{7, 3, 5},
                               Extent{13, 30, 45}, Extent{33, 48, 80}, Extent{2, 2, 2}, Extent{16, 2, 4}}) {
    const auto order = gilbert_order(extent);
    ASSERT_TRUE(is_permutation_of(order, extent[0] * extent[1] * extent[2]));
    const bool even = extent[0] % 2 == 0 && extent[1] % 2 == 0 && extent[2] % 2 == 0;
    for (std::size_t i = 1; i < order.size(); ++i) {
      const auto at = [&](std::int64_t cell) {
        return Extent{cell / (extent[1] * extent[2]), cell / extent[2] % extent[1], cell % extent[2]};
      };
      const Extent a = at(order[i - 1]);
      const Extent b = at(order[i]);
      const std::int64_t step = std::abs(a[0] - b[0]) + std::abs(a[1] - b[1]) + std::abs(a[2] - b[2]);
      ASSERT_LE(step, even ? 1 : 2) << "step " << i << " of " << extent[0] << "x" << extent[1] << "x" << extent[2];
    }
  }
}

TEST(TokenOrder, TextFollowsTheGrid) {
  const TokenGrid grid{{1, 1, 3}, 2, 1};
  const auto tokens = with_text(grid, std::vector<std::int32_t>{2, 0, 1});
  EXPECT_EQ(tokens, (std::vector<std::int32_t>{4, 2, 3, 0, 1, 5}));
  Problem problem;
  problem.q_len = 3;
  problem.kv_len = 6;
  problem.q_offset = 2;
  EXPECT_EQ(queries_in_order(problem, 0, tokens), (std::vector<std::int32_t>{2, 0, 1}));
  problem.q_offset = 5;  // two of them behind the keys
  EXPECT_EQ(queries_in_order(problem, 0, tokens), (std::vector<std::int32_t>{0, 1, 2}));
}

}  // namespace
}  // namespace tessera::score
