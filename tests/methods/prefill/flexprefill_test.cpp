// FlexPrefill: which pattern a head gets, what each keeps, and how its counts follow the probed mass.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <set>

#include "methods/masks.h"

namespace tessera {
namespace {

using test::AttentionCase;
using test::CaseShape;
using test::masks_of;

/// The text once more, in float64 and with plain loops, for lengths that are multiples of the tile.
class Reference {
 public:
  Reference(const AttentionCase& input, std::int64_t head, std::int64_t block, double gamma, double tau,
            std::int64_t min_budget)
      : input_(input), head_(head), block_(block), n_(input.problem.kv_len), tiles_(n_ / block) {
    const std::int64_t q_tiles = input.problem.q_len / block;
    const std::int64_t shift = tiles_ - q_tiles;
    std::vector<double> columns(static_cast<std::size_t>(n_), 0.0);
    std::vector<double> offsets(static_cast<std::size_t>(n_), 0.0);
    for (std::int64_t r = input.problem.q_len - block; r < input.problem.q_len; ++r) {
      const auto p = input.probabilities(0, head, r);
      for (std::int64_t j = 0; j <= shift * block + r; ++j) {
        columns[j] += p[j] / static_cast<double>(block);
        offsets[shift * block + r - j] += p[j] / static_cast<double>(block);
      }
    }
    const auto truth = pool(columns);
    query_aware = distance(softmax_of_means(q_tiles - 1, tiles_), truth) < tau;
    const std::int64_t least = (min_budget + block - 1) / block;
    const auto count = [&](std::vector<double> line) {
      std::sort(line.begin(), line.end(), std::greater<>());
      double sum = 0;
      std::int64_t below = 0;
      for (const double x : line) below += (sum += x) <= gamma ? 1 : 0;
      return query_aware ? least : std::max(least, (below + 1) / block + 1);
    };
    const auto best_columns = best(truth, count(columns));
    const auto best_diagonals = best(pool(offsets), count(offsets));
    std::set<std::pair<std::int64_t, std::int64_t>> pooled;
    if (query_aware) pooled = pooled_tiles(q_tiles, shift, gamma);
    for (std::int64_t i = 0; i < q_tiles; ++i) {
      std::set<std::int64_t>& row = rows.emplace_back();
      for (std::int64_t j = 0; j <= i + shift; ++j) {
        if (best_columns.contains(j) || best_diagonals.contains(i + shift - j) || pooled.contains({i, j}))
          row.insert(j);
      }
    }
  }

  bool query_aware = false;
  std::vector<std::set<std::int64_t>> rows;  ///< key tiles per query tile

 private:
  std::vector<double> pool(const std::vector<double>& values) const {
    std::vector<double> sums(static_cast<std::size_t>(tiles_), 0.0);
    for (std::int64_t i = 0; i < n_; ++i) sums[i / block_] += values[i];
    return sums;
  }
  /// Softmax over the first `visible` key tiles of mean query . mean key.
  std::vector<double> softmax_of_means(std::int64_t query_tile, std::int64_t visible) const {
    std::vector<double> row(static_cast<std::size_t>(tiles_), 0.0);
    double sum = 0;
    for (std::int64_t j = 0; j < visible; ++j) {
      double dot = 0;
      for (std::int64_t d = 0; d < input_.problem.head_dim; ++d) {
        double q = 0;
        double k = 0;
        for (std::int64_t t = 0; t < block_; ++t) {
          q += input_.q(0, head_, query_tile * block_ + t, d);
          k += input_.k(0, head_ / input_.problem.group(), j * block_ + t, d);
        }
        dot += q * k / static_cast<double>(block_ * block_);
      }
      sum += row[j] = std::exp(dot * input_.problem.softmax_scale());
    }
    for (double& x : row) x /= sum;
    return row;
  }
  static double distance(const std::vector<double>& p, const std::vector<double>& q) {
    double divergence = 0;
    for (std::size_t i = 0; i < p.size(); ++i) {
      const double m = (p[i] + q[i]) / 2;
      if (p[i] > 0) divergence += 0.5 * p[i] * std::log(p[i] / m);
      if (q[i] > 0) divergence += 0.5 * q[i] * std::log(q[i] / m);
    }
    return std::sqrt(divergence);
  }
  static std::set<std::int64_t> best(std::vector<double> scores, std::int64_t count) {
    scores[0] = 1e30;
    std::vector<std::int64_t> order(scores.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return scores[a] > scores[b]; });
    order.resize(static_cast<std::size_t>(std::min<std::int64_t>(count, static_cast<std::int64_t>(order.size()))));
    return {order.begin(), order.end()};
  }
  std::set<std::pair<std::int64_t, std::int64_t>> pooled_tiles(std::int64_t q_tiles, std::int64_t shift,
                                                               double gamma) const {
    std::vector<std::pair<double, std::pair<std::int64_t, std::int64_t>>> all;
    for (std::int64_t i = 0; i < q_tiles; ++i) {
      const auto row = softmax_of_means(i, i + shift + 1);
      for (std::int64_t j = 0; j <= i + shift; ++j) all.push_back({-row[j], {i, j}});
    }
    std::sort(all.begin(), all.end());
    std::set<std::pair<std::int64_t, std::int64_t>> kept;
    double sum = 0;
    for (const auto& [score, at] : all) {
      sum -= score;
      if (sum > gamma * static_cast<double>(q_tiles)) break;
      kept.insert(at);
    }
    return kept;
  }

  const AttentionCase& input_;
  std::int64_t head_;
  std::int64_t block_;
  std::int64_t n_;
  std::int64_t tiles_;
};

/// Keys [first, end) of one head's kv head point the way that queries like; head 0 only.
AttentionCase planted(const CaseShape& shape, float strength) {
  AttentionCase input(shape, 5);
  for (std::int64_t h = 0; h < shape.kv_heads; ++h) {
    for (std::int64_t n = 0; n < shape.kv_len; ++n) {
      const bool hot = n % 97 < 3 || (n >= 200 && n < 240);
      for (std::int64_t d = 0; d < shape.head_dim; ++d) input.set_k(0, h, n, d, input.k(0, h, n, d) * 0.5F);
      if (hot) input.set_k(0, h, n, 0, strength);
    }
  }
  for (std::int64_t h = 0; h < shape.q_heads; ++h) {
    for (std::int64_t n = 0; n < shape.q_len; ++n) input.set_q(0, h, n, 0, 2);
  }
  return input;
}

TEST(FlexPrefill, FollowsTheTextWithPlainLoops) {
  std::int64_t aware = 0;
  std::int64_t lines = 0;
  for (const std::int64_t q_len : {512, 256}) {
    const AttentionCase input =
        planted({.name = "planted", .q_heads = 4, .kv_heads = 2, .q_len = q_len, .kv_len = 512}, 9);
    for (const auto& [gamma, tau] : {std::pair{0.7, 0.0}, {0.7, 1.0}, {0.4, 0.35}, {0.9, 0.5}, {0.2, 1.0}}) {
      const auto masks = masks_of(fmt::format("flexprefill:block=32,gamma={},tau={},min_budget=64", gamma, tau), input);
      for (std::int64_t h = 0; h < 4; ++h) {
        const Reference expected(input, h, 32, gamma, tau, 64);
        (expected.query_aware ? aware : lines) += 1;
        for (std::int64_t n = 0; n < q_len; ++n) {
          for (std::int64_t j = 0; j < 512; ++j) {
            ASSERT_EQ(masks[h].at(n, j), input.allowed(0, n, j) && expected.rows[n / 32].contains(j / 32))
                << "gamma " << gamma << ", tau " << tau << ", head " << h << ", query " << n << ", key " << j;
          }
        }
      }
    }
  }
  EXPECT_GT(aware, 3);
  EXPECT_GT(lines, 3);
}

TEST(FlexPrefill, EqualDistributionsHaveDistanceZero) {
  // All keys equal: pooled estimate and probe are both uniform over whole tiles, so the smallest tau finds the head
  // query aware, and one that is zero does not.
  AttentionCase input({.name = "equal", .q_heads = 1, .q_len = 16, .kv_len = 512, .q_offset = 512});
  for (std::int64_t n = 0; n < 512; ++n) {
    for (std::int64_t d = 0; d < 16; ++d) input.set_k(0, 0, n, d, 0.25F);
  }
  // A query-aware head keeps half of the tiles by pooled scores, and the last tile, which is nearest to its diagonal; a
  // vertical-slash head counts 17 columns and 17 distances, which lie apart here.
  const auto kept = [&](const std::string& tau) {
    const auto mask = masks_of("flexprefill:block=16,gamma=0.5,min_budget=16,tau=" + tau, input)[0];
    return std::count(mask.bits.begin(), mask.bits.begin() + 512, 1);
  };
  EXPECT_EQ(kept("1e-3"), 17 * 16);
  EXPECT_EQ(kept("0"), 512);
}

TEST(FlexPrefill, FirstAndDiagonalTileAlwaysStay) {
  const AttentionCase input({.name = "random", .q_len = 333, .kv_len = 600});
  for (const std::string tau : {"0", "1"}) {
    for (const auto& mask : masks_of("flexprefill:block=64,gamma=0.01,min_budget=0,tau=" + tau, input)) {
      for (std::int64_t n = 0; n < 333; ++n) {
        ASSERT_TRUE(mask.at(n, 0)) << n;
        ASSERT_TRUE(mask.at(n, n + 267)) << n;
      }
    }
  }
}

TEST(FlexPrefill, ProbedRowsKeepGammaOfTheirMass) {
  // Keys of a tile are equal, so that as many tiles as the lines fill hold what the lines hold.
  AttentionCase input({.name = "mass", .q_heads = 2, .q_len = 640, .kv_len = 640});
  for (std::int64_t n = 0; n < 640; ++n) {
    for (std::int64_t d = 0; d < 16; ++d) input.set_k(0, 0, n, d, input.k(0, 0, n / 64 * 64, d));
  }
  for (const double gamma : {0.5, 0.8, 0.95}) {
    const auto masks = masks_of(fmt::format("flexprefill:block=64,tau=0,min_budget=0,gamma={}", gamma), input);
    for (std::int64_t h = 0; h < 2; ++h) {
      double kept = 0;
      for (std::int64_t n = 576; n < 640; ++n) {
        const auto p = input.probabilities(0, h, n);
        for (std::int64_t j = 0; j < 640; ++j) kept += masks[h].at(n, j) ? p[j] : 0;
      }
      EXPECT_GE(kept / 64, gamma) << "gamma " << gamma << ", head " << h;
    }
  }
}

/// Mean share of the last `probed` rows' mass that a mask keeps.
double kept_mass(const AttentionCase& input, const test::HeadMask& mask, std::int64_t head, std::int64_t probed) {
  double kept = 0;
  for (std::int64_t n = mask.queries - probed; n < mask.queries; ++n) {
    const auto p = input.probabilities(0, head, n);
    for (std::int64_t j = 0; j < mask.keys; ++j) kept += mask.at(n, j) ? p[j] : 0;
  }
  return kept / static_cast<double>(probed);
}

TEST(FlexPrefill, TilesHoldGammaOfScatteredColumns) {
  // One hot key in every second tile: as many columns as fit in one tile, which lie in twelve.
  AttentionCase input({.name = "columns", .q_heads = 2, .q_len = 1536, .kv_len = 1536});
  for (std::int64_t n = 0; n < 1536; ++n) {
    for (std::int64_t h = 0; h < 2; ++h) {
      for (std::int64_t d = 0; d < 16; ++d) input.set_q(0, h, n, d, d == 0 ? 4 : 0);
    }
    input.set_k(0, 0, n, 0, n % 128 == 37 ? 10 : 0);
  }
  for (const double gamma : {0.5, 0.9}) {
    const std::string common = fmt::format("flexprefill:block=64,tau=0,min_budget=0,gamma={},count=", gamma);
    for (std::int64_t h = 0; h < 2; ++h) {
      EXPECT_GE(kept_mass(input, masks_of(common + "tiles", input)[h], h, 64), gamma);
      EXPECT_LT(kept_mass(input, masks_of(common + "lines", input)[h], h, 64), 0.4) << "as the authors' code counts";
    }
  }
}

TEST(FlexPrefill, TilesHoldBothDiagonalsOfADistance) {
  // Every query finds the key 160 before it: distance 2.5 tiles lies in tile diagonals 2 and 3.
  AttentionCase input({.name = "diagonal", .q_heads = 1, .q_len = 1024, .kv_len = 1024});
  for (std::int64_t n = 0; n < 1024; ++n) {
    for (std::int64_t f = 0; f < 8; ++f) {
      const double w = std::pow(0.4, f + 1) * 6;
      const auto at = static_cast<double>(n);
      input.set_k(0, 0, n, 2 * f, static_cast<float>(std::cos(w * at)));
      input.set_k(0, 0, n, 2 * f + 1, static_cast<float>(std::sin(w * at)));
      input.set_q(0, 0, n, 2 * f, static_cast<float>(12 * std::cos(w * (at - 160))));
      input.set_q(0, 0, n, 2 * f + 1, static_cast<float>(12 * std::sin(w * (at - 160))));
    }
  }
  const auto diagonals = [&](const std::string& count) {
    const auto mask =
        masks_of("flexprefill:block=64,tau=0,min_budget=128,max_budget=192,gamma=0.9,count=" + count, input)[0];
    std::set<std::int64_t> all;  // of the middle of the sequence, whose columns say little of the end
    for (std::int64_t j = 64; j < 640; j += 64) {
      if (mask.at(640, j)) all.insert((640 - j) / 64);
    }
    return all;
  };
  EXPECT_TRUE(diagonals("tiles").contains(2));
  EXPECT_TRUE(diagonals("tiles").contains(3));
  EXPECT_TRUE(diagonals("lines").contains(2));
  EXPECT_FALSE(diagonals("lines").contains(3)) << "as the authors' code counts";
}

TEST(FlexPrefill, BudgetsBound) {
  const AttentionCase input({.name = "flat", .q_heads = 1, .q_len = 64, .kv_len = 2048});
  const auto tiles = [&](const std::string& budgets) {
    const auto mask = masks_of("flexprefill:block=64,tau=0," + budgets, input)[0];
    std::int64_t count = 0;
    for (std::int64_t j = 0; j < 2048; j += 64) count += mask.at(63, j) ? 1 : 0;
    return count;
  };
  EXPECT_EQ(tiles("gamma=1"), 32);
  EXPECT_LE(tiles("gamma=0.9,min_budget=0,max_budget=128"), 4) << "two vertical, two slash";
  EXPECT_GE(tiles("gamma=0,min_budget=512"), 8);
  EXPECT_EQ(tiles("gamma=0,min_budget=2048"), 32) << "no longer than its budget: dense";
}

TEST(FlexPrefill, FullBudgetAndEveryShape) {
  for (const CaseShape& shape : test::all_shapes()) {
    const AttentionCase input(shape);
    SCOPED_TRACE(shape.name);
    for (const std::string spec : {"flexprefill:gamma=1", "flexprefill:gamma=0,min_budget=100000"}) {
      const auto method = make_method(spec);
      if (input.problem.causal) test::expect_full_budget_is_dense(*method, input);
    }
    for (const std::string spec : {"flexprefill:block=32,gamma=0.5,tau=0,min_budget=32",
                                   "flexprefill:block=32,gamma=0.8,tau=0,min_budget=32,count=tiles",
                                   "flexprefill:block=16,gamma=0.6,tau=1,min_budget=0"}) {
      const auto method = make_method(spec);
      if (!input.problem.causal) {
        EXPECT_THROW(method->plan(input.problem, input.inputs, {}), Error);
      } else {
        test::expect_plans_hold(*method, input);
      }
    }
  }
}

TEST(FlexPrefill, UndefinedScoresKeepEverything) {
  AttentionCase input({.name = "nan", .q_heads = 1, .q_len = 256, .kv_len = 256});
  input.set_k(0, 0, 40, 0, std::nanf(""));
  for (const std::string count : {"lines", "tiles"}) {
    const auto mask = masks_of("flexprefill:block=16,gamma=0.3,min_budget=16,count=" + count, input)[0];
    for (std::int64_t n = 0; n < 256; ++n) ASSERT_TRUE(mask.at(n, std::min<std::int64_t>(n, 40)));
  }
}

}  // namespace
}  // namespace tessera
