// Neighbourhoods on one axis and their simulator, against walks over all pairs.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "score/neighborhood_simulator.h"

namespace tessera::score {
namespace {

/// Every axis up to this length without dilation.
void for_each_axis(std::int64_t longest, const std::function<void(const NeighborhoodAxis&)>& body) {
  for (std::int64_t n = 1; n <= longest; ++n) {
    for (std::int64_t w = 1; w <= n; ++w) {
      for (std::int64_t s = 1; s <= w; ++s) {
        for (const bool causal : {false, true}) body({.length = n, .window = w, .stride = s, .causal = causal});
      }
    }
  }
}

TEST(NeighborhoodAxis, HasTheWindowOfTheLeader) {
  // Interior, both borders, even and odd windows, by hand.
  const NeighborhoodAxis odd{.length = 10, .window = 5};
  EXPECT_EQ(odd.keys_of(5, 10), (Interval{3, 8}));
  EXPECT_EQ(odd.keys_of(0, 10), (Interval{0, 5}));
  EXPECT_EQ(odd.keys_of(9, 10), (Interval{5, 10}));
  const NeighborhoodAxis even{.length = 10, .window = 4};
  EXPECT_EQ(even.keys_of(5, 10), (Interval{3, 7}));  // leans to the left
  const NeighborhoodAxis strided{.length = 10, .window = 4, .stride = 3};
  EXPECT_EQ(strided.keys_of(3, 10), (Interval{2, 6}));  // leader 4
  EXPECT_EQ(strided.keys_of(5, 10), (Interval{2, 6}));
  EXPECT_EQ(strided.keys_of(9, 10), (Interval{6, 10}));  // leader cut to the last place
  const NeighborhoodAxis causal{.length = 10, .window = 4, .stride = 2, .causal = true};
  EXPECT_EQ(causal.keys_of(4, 10), (Interval{2, 5}));  // leader 5
  EXPECT_EQ(causal.keys_of(5, 10), (Interval{2, 6}));
  EXPECT_EQ(causal.keys_of(0, 10), (Interval{0, 1}));
}

TEST(NeighborhoodAxis, EveryQueryHasTheWholeWindow) {
  for_each_axis(24, [](const NeighborhoodAxis& axis) {
    for (std::int64_t i = 0; i < axis.length; ++i) {
      const Interval keys = axis.keys_of(i, axis.length);
      ASSERT_GE(keys.begin, 0);
      ASSERT_LE(keys.end, axis.length);
      if (axis.causal) {
        ASSERT_EQ(keys.end, i + 1);
        ASSERT_GE(keys.size(), 1);
        ASSERT_LE(keys.size(), axis.window);
      } else {
        ASSERT_EQ(keys.size(), axis.window);
        const Interval leader = axis.keys_of(i / axis.stride * axis.stride, axis.length);
        ASSERT_EQ(keys, leader);  // rows of a stride group are identical
      }
      ASSERT_GE(keys.begin, axis.keys_of(i == 0 ? 0 : i - 1, axis.length).begin);
    }
  });
}

TEST(NeighborhoodAxis, InverseMapIsTheTranspose) {
  for_each_axis(30, [](const NeighborhoodAxis& axis) {
    const std::int64_t n = axis.length;
    for (std::int64_t j = 0; j < n; ++j) {
      const Interval queries = axis.queries_of(j, n);
      for (std::int64_t i = 0; i < n; ++i) {
        const Interval keys = axis.keys_of(i, n);
        const bool sees = keys.begin <= j && j < keys.end;
        ASSERT_EQ(queries.begin <= i && i < queries.end, sees)
            << "length " << n << ", window " << axis.window << ", stride " << axis.stride << ", causal " << axis.causal
            << ", key " << j << ", query " << i;
      }
    }
  });
}

TEST(NeighborhoodAxis, DilationGroupsHaveTheirOwnLengths) {
  const NeighborhoodAxis axis{.length = 11, .window = 3, .dilation = 4};
  EXPECT_EQ(axis.length_of(0), 3);
  EXPECT_EQ(axis.length_of(2), 3);
  EXPECT_EQ(axis.length_of(3), 2);
  EXPECT_EQ(axis.coordinate(3, 1), 7);
  EXPECT_EQ(axis.group_of(-1), 3);
  EXPECT_EQ(axis.place_of(-1), -1);
}

TEST(NeighborhoodAxis, BlockSparseMeansThatNoTileIsCut) {
  std::int64_t held = 0;
  for_each_axis(24, [&](const NeighborhoodAxis& axis) {
    for (std::int64_t tile_q = 1; tile_q <= 8; ++tile_q) {
      for (std::int64_t tile_k = 1; tile_k <= 8; ++tile_k) {
        bool whole = true;
        for (std::int64_t first = 0; first < axis.length; first += tile_q) {
          const std::int64_t last = std::min(first + tile_q, axis.length) - 1;
          const Interval some{axis.keys_of(first, axis.length).begin, axis.keys_of(last, axis.length).end};
          for (std::int64_t i = first; i <= last; ++i) {
            const Interval keys = axis.keys_of(i, axis.length);
            for (std::int64_t tile = some.begin / tile_k; tile * tile_k < some.end; ++tile) {
              whole = whole && keys.begin <= tile * tile_k && keys.end >= std::min((tile + 1) * tile_k, axis.length);
            }
          }
        }
        held += whole ? 1 : 0;
        ASSERT_EQ(axis.block_sparse(tile_q, tile_k), whole)
            << "length " << axis.length << ", window " << axis.window << ", stride " << axis.stride << ", causal "
            << axis.causal << ", tiles " << tile_q << " and " << tile_k;
      }
    }
  });
  EXPECT_GT(held, 1000);
}

TEST(NeighborhoodSimulator, IsPerfectOnThePapersVideoGrid) {
  // HunyuanVideo 30x48x80, 91 % sparse: with these tiles every visited tile is seen whole.
  const Neighborhood axes{NeighborhoodAxis{.length = 30, .window = 18, .stride = 16},
                          NeighborhoodAxis{.length = 48, .window = 24, .stride = 8},
                          NeighborhoodAxis{.length = 80, .window = 24, .stride = 8}};
  const TileShapes tiles{.q = {2, 8, 8}, .k = {2, 8, 8}};
  const NeighborhoodCost cost = simulate(axes, tiles);
  EXPECT_NEAR(cost.flop_speedup, 100.0 / 9, 0.01);
  EXPECT_TRUE(cost.block_sparse);
  EXPECT_DOUBLE_EQ(cost.speedup(), cost.flop_speedup);
  EXPECT_EQ(cost.visited_pairs, cost.pairs);
  EXPECT_EQ(cost.pairs, 30LL * 48 * 80 * 18 * 24 * 24);
  // Stride 1 costs the tiles that the windows cut.
  Neighborhood fine = axes;
  for (NeighborhoodAxis& axis : fine) axis.stride = 1;
  EXPECT_LT(simulate(fine, tiles).speedup(), 0.7 * cost.speedup());
}

TEST(NeighborhoodSimulator, CountsTheTilesThatQueriesSee) {
  for_each_axis(14, [](const NeighborhoodAxis& axis) {
    for (const std::int64_t tile_q : {1, 3, 4}) {
      for (const std::int64_t tile_k : {1, 2, 5}) {
        const Neighborhood axes{NeighborhoodAxis{}, NeighborhoodAxis{}, axis};
        const NeighborhoodCost cost = simulate(axes, {{1, 1, tile_q}, {1, 1, tile_k}});
        std::int64_t most = 0;
        std::int64_t pairs = 0;
        std::int64_t visited_pairs = 0;
        for (std::int64_t first = 0; first < axis.length; first += tile_q) {
          const std::int64_t end = std::min(first + tile_q, axis.length);
          std::int64_t visited = 0;
          for (std::int64_t k = 0; k < axis.length; k += tile_k) {
            const std::int64_t k_end = std::min(k + tile_k, axis.length);
            bool seen = false;
            for (std::int64_t i = first; i < end; ++i) {
              const Interval keys = axis.keys_of(i, axis.length);
              for (std::int64_t j = k; j < k_end; ++j) {
                if (j < keys.begin || j >= keys.end) continue;
                seen = true;
                ++pairs;
              }
            }
            visited += seen ? 1 : 0;
            visited_pairs += seen ? (end - first) * (k_end - k) : 0;
          }
          most = std::max(most, visited);
        }
        ASSERT_EQ(cost.most_visited, most);
        ASSERT_EQ(cost.visited_pairs, visited_pairs);
        ASSERT_EQ(cost.pairs, pairs);
      }
    }
  });
}

TEST(NeighborhoodSimulator, DynamicTilingIsPerfectWhereTilesDivide) {
  for (std::int64_t w = 4; w <= 16; ++w) {
    for (std::int64_t s = 1; s <= w; ++s) {
      const Neighborhood axes{NeighborhoodAxis{}, NeighborhoodAxis{},
                              NeighborhoodAxis{.length = 64, .window = w, .stride = s}};
      const NeighborhoodCost cost = simulate(axes, {{1, 1, 4}, {1, 1, 4}}, Tiling::dynamic);
      const bool divides = w % 4 == 0 && s % 4 == 0;
      EXPECT_EQ(cost.most_visited * 4 == w, divides) << "window " << w << ", stride " << s;
    }
  }
}

TEST(NeighborhoodSimulator, StrideOptionsOnlyGetFaster) {
  const NeighborhoodAxis axis{.length = 96, .window = 32};
  const auto options = stride_options(axis, 8, 8);
  ASSERT_GE(options.size(), 2U);
  EXPECT_EQ(options.front().stride, 1);
  EXPECT_EQ(options.back().most_visited, 4);  // as few tiles as the window holds
  for (std::size_t i = 1; i < options.size(); ++i) {
    EXPECT_GT(options[i].stride, options[i - 1].stride);
    EXPECT_LT(options[i].most_visited, options[i - 1].most_visited);
  }
  for (std::int64_t s = 1; s <= 32; ++s) {
    NeighborhoodAxis other = axis;
    other.stride = s;
    const Neighborhood axes{NeighborhoodAxis{}, NeighborhoodAxis{}, other};
    EXPECT_GE(simulate(axes, {{1, 1, 8}, {1, 1, 8}}).most_visited, options.back().most_visited);
  }
}

TEST(NeighborhoodSimulator, ChosenTilesFollowTheGrid) {
  const Neighborhood axes{NeighborhoodAxis{.length = 30, .window = 18, .stride = 16},
                          NeighborhoodAxis{.length = 48, .window = 24, .stride = 8},
                          NeighborhoodAxis{.length = 80, .window = 24, .stride = 8}};
  const TileShapes tiles = choose_tiles(axes, 128, 128);
  for (int a = 1; a < 3; ++a) EXPECT_EQ(axes[a].length % tiles.q[a], 0);
  EXPECT_LE(tiles.q[0] * tiles.q[1] * tiles.q[2], 128);
  EXPECT_LE(tiles.k[0] * tiles.k[1] * tiles.k[2], 128);
  const NeighborhoodCost chosen = simulate(axes, tiles);
  EXPECT_LT(static_cast<double>(chosen.visited_pairs), 1.1 * static_cast<double>(chosen.pairs));
  // Rows of the grid as tiles would visit several times as much.
  EXPECT_GT(simulate(axes, {{1, 1, 80}, {1, 1, 80}}).visited_pairs, 2 * chosen.visited_pairs);
}

TEST(NeighborhoodSimulator, EndToEndIsAmdahl) {
  EXPECT_DOUBLE_EQ(end_to_end_speedup(0, 10), 1);
  EXPECT_DOUBLE_EQ(end_to_end_speedup(1, 10), 10);
  EXPECT_NEAR(end_to_end_speedup(0.5, 10), 1 / 0.55, 1e-12);
}

}  // namespace
}  // namespace tessera::score
