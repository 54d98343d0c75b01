// SpargeAttn: prediction by means where tokens are alike, budgets, and the skip while running.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <numeric>

#include "methods/attended.h"
#include "score/self_similarity.h"

namespace tessera {
namespace {

using test::AttentionCase;
using test::CaseShape;
using test::HeadMask;
using test::masks_of;

constexpr std::int64_t kDim = 16;

/// Tokens in tiles of 16 that are alike in most tiles and random in some: every `wild`-th.
AttentionCase clustered(CaseShape shape, std::int64_t wild = 4) {
  AttentionCase input(std::move(shape), 3);
  const auto base = [](std::int64_t tile, std::int64_t d) {
    return std::sin(static_cast<double>(7 * tile + 3 * d + 1));
  };
  for (std::int64_t s = 0; s < input.problem.batch; ++s) {
    for (std::int64_t h = 0; h < input.problem.q_heads; ++h) {
      for (std::int64_t n = 0; n < input.problem.q_len_of(s); ++n) {
        if ((n / 16 + h) % wild == 1) continue;
        for (std::int64_t d = 0; d < kDim; ++d) {
          const double noise = 0.1 * input.q(s, h, n, d);
          input.set_q(s, h, n, d, static_cast<float>(2 * base(n / 16 + h, d) + noise));
        }
      }
    }
    for (std::int64_t h = 0; h < input.problem.kv_heads; ++h) {
      for (std::int64_t n = 0; n < input.problem.kv_len_of(s); ++n) {
        if ((n / 16 + h) % wild == 2) continue;
        for (std::int64_t d = 0; d < kDim; ++d) {
          const double noise = 0.2 * input.k(s, h, n, d);
          input.set_k(s, h, n, d, static_cast<float>(2 * base(n / 16 + 2 * h, d) + noise));
        }
      }
    }
  }
  return input;
}

struct Choice {
  double theta = 0.6;
  double cdf = -1;  ///< below 0: top-k
  double topk = 0.4;
  bool sink = true;
  bool smooth = true;
  std::string spec() const {
    return fmt::format("sparge:theta={},rule={},cdf={},topk={},sink={},smooth={},block_q=32,block_k=16", theta,
                       cdf < 0 ? "topk" : "cdf", std::max(cdf, 0.0), topk, sink, smooth);
  }
};

/// Mean and mean cosine over all pairs of rows.
struct Tile {
  std::vector<double> mean;
  double similarity;
};

Tile tile_of(const std::vector<std::vector<double>>& rows) {
  Tile tile{std::vector<double>(kDim, 0.0), 0};
  const auto count = static_cast<double>(rows.size());
  for (const auto& a : rows) {
    for (std::int64_t d = 0; d < kDim; ++d) tile.mean[d] += a[d] / count;
    for (const auto& b : rows) {
      const auto dot = [](const auto& x, const auto& y) {
        return std::inner_product(x.begin(), x.end(), y.begin(), 0.0);
      };
      tile.similarity += dot(a, b) / std::sqrt(dot(a, a) * dot(b, b)) / count / count;
    }
  }
  return tile;
}

/// The text once more, in float64 and with plain loops; without the guard for empty queries, which needs sink = false.
std::vector<HeadMask> expected_masks(const AttentionCase& input, const Choice& choice) {
  const Problem& problem = input.problem;
  std::vector<HeadMask> masks;
  for (std::int64_t s = 0; s < problem.batch; ++s) {
    for (std::int64_t h = 0; h < problem.q_heads; ++h) {
      const std::int64_t keys = problem.kv_len_of(s);
      std::vector<std::vector<double>> k(static_cast<std::size_t>(keys));
      std::vector<double> centre(kDim, 0.0);
      for (std::int64_t j = 0; j < keys; ++j) {
        for (std::int64_t d = 0; d < kDim; ++d) {
          k[j].push_back(input.k(s, h / problem.group(), j, d));
          centre[d] += choice.smooth ? k[j][d] / static_cast<double>(keys) : 0;
        }
      }
      std::vector<Tile> key_tiles;
      for (std::int64_t j = 0; j < keys; j += 16) {
        std::vector<std::vector<double>> rows(k.begin() + j, k.begin() + std::min(j + 16, keys));
        for (auto& row : rows) {
          for (std::int64_t d = 0; d < kDim; ++d) row[d] -= centre[d];
        }
        key_tiles.push_back(tile_of(rows));
      }
      HeadMask mask{problem.q_len_of(s), keys, {}};
      std::vector<std::uint8_t> keep;
      for (std::int64_t n = 0; n < mask.queries; ++n) {
        if (n % 32 == 0) {
          std::vector<std::vector<double>> rows;
          for (std::int64_t r = n; r < std::min(n + 32, mask.queries); ++r) {
            rows.emplace_back();
            for (std::int64_t d = 0; d < kDim; ++d) rows.back().push_back(input.q(s, h, r, d));
          }
          const Tile own = tile_of(rows);
          const std::int64_t last = test::position(input, s, n + static_cast<std::int64_t>(rows.size()) - 1);
          const auto visible = [&](std::size_t j) {
            return !problem.causal || static_cast<std::int64_t>(j) * 16 <= last;
          };
          keep.assign(key_tiles.size(), own.similarity > choice.theta ? 0 : 1);
          std::vector<std::pair<double, std::size_t>> weights;  // negative, so that ties go to the smaller index
          double sum = 0;
          for (std::size_t j = 0; j < key_tiles.size(); ++j) {
            if (!(key_tiles[j].similarity > choice.theta)) {
              keep[j] = 1;
            } else if (visible(j)) {
              double dot = 0;
              for (std::int64_t d = 0; d < kDim; ++d) dot += own.mean[d] * key_tiles[j].mean[d];
              weights.emplace_back(-std::exp(dot * problem.softmax_scale()), j);
              sum -= weights.back().first;
            }
          }
          std::sort(weights.begin(), weights.end());
          std::size_t count = static_cast<std::size_t>(choice.topk * static_cast<double>(key_tiles.size()));
          if (choice.cdf >= 0) {
            count = 0;
            for (double taken = 0; count < weights.size(); ++count) {
              taken -= weights[count].first / sum;
              if (taken > choice.cdf) break;
            }
          }
          count = std::min(std::max<std::size_t>(1, count), weights.size());
          for (std::size_t i = 0; i < count; ++i) keep[weights[i].second] = 1;
          if (choice.sink) keep[0] = 1;
        }
        for (std::int64_t j = 0; j < keys; ++j)
          mask.bits.push_back(keep[j / 16] != 0 && input.allowed(s, n, j) ? 1 : 0);
      }
      masks.push_back(mask);
    }
  }
  return masks;
}

TEST(Sparge, FollowsTheTextWithPlainLoops) {
  std::int64_t sparse = 0;
  for (const CaseShape& shape : {CaseShape{.name = "square", .q_heads = 4, .kv_heads = 2, .q_len = 250, .kv_len = 250},
                                 CaseShape{.name = "chunk", .batch = 2, .q_len = 70, .kv_len = 333},
                                 CaseShape{.name = "both", .q_len = 200, .kv_len = 150, .causal = false},
                                 CaseShape{.name = "lengths", .q_lens = {130, 1, 64}, .kv_lens = {260, 10, 64}}}) {
    const AttentionCase input = clustered(shape);
    for (const Choice& choice :
         {Choice{}, Choice{.cdf = 0.9}, Choice{.cdf = 0.5, .smooth = false}, Choice{.theta = 0.2, .cdf = 0.7},
          Choice{.theta = -1, .topk = 0.2}, Choice{.cdf = 0}, Choice{.topk = 0}}) {
      SCOPED_TRACE(shape.name + " " + choice.spec());
      const auto expected = expected_masks(input, choice);
      EXPECT_TRUE(masks_of(choice.spec(), input) == expected);
      sparse += expected == test::dense_masks(input) ? 0 : 1;
    }
  }
  EXPECT_GT(sparse, 20);
}

TEST(Sparge, SimilarityIsTheMeanCosine) {
  AttentionCase input({.name = "cosines", .q_heads = 1, .q_len = 64, .kv_len = 64});
  for (std::int64_t n = 0; n < 64; ++n) {
    for (std::int64_t d = 0; d < kDim; ++d) {
      if (n < 16) input.set_k(0, 0, n, d, static_cast<float>(d) - 3);                                 // identical
      if (n / 16 == 1) input.set_k(0, 0, n, d, (n % 2 == 0 ? 1.0F : -1.0F) * static_cast<float>(d));  // alternating
      if (n == 40) input.set_k(0, 0, n, d, 0);
    }
  }
  const score::SimilarTiles tiles = score::similar_keys(input.problem, input.inputs, 0, 0, 16, {});
  EXPECT_NEAR(tiles.similarity[0], 1, 1e-5);
  EXPECT_NEAR(tiles.similarity[1], 0, 1e-5);
  EXPECT_TRUE(std::isnan(tiles.similarity[2]));  // a zero token: not above any theta, so it is computed
  std::vector<std::vector<double>> rows;
  for (std::int64_t n = 48; n < 64; ++n) {
    rows.emplace_back();
    for (std::int64_t d = 0; d < kDim; ++d) rows.back().push_back(input.k(0, 0, n, d));
  }
  EXPECT_NEAR(tiles.similarity[3], tile_of(rows).similarity, 1e-5);
}

TEST(Sparge, TilesThatCannotBeTrustedAreComputed) {
  const AttentionCase input = clustered({.name = "wild", .q_heads = 1, .q_len = 512, .kv_len = 512});
  const auto mask = masks_of("sparge:theta=0.6,rule=topk,topk=0.01,block_q=16,block_k=16", input)[0];
  for (std::int64_t n = 0; n < 512; ++n) {
    for (std::int64_t j = 0; j <= n; ++j) {
      if (j / 16 % 4 == 2 || n / 16 % 4 == 1) {
        ASSERT_TRUE(mask.at(n, j)) << n << " " << j;
      }
    }
  }
  EXPECT_FALSE(mask.at(511, 16) && mask.at(511, 48) && mask.at(511, 64));
}

TEST(Sparge, TheSkipLeavesLowTilesOutOfTheSoftmax) {
  // Tile 0 has score 0, tiles 1 and 2 are 8 powers of 2 below it, the last ones lie under the causal mask.
  AttentionCase input({.name = "skip", .q_heads = 1, .q_len = 64, .kv_len = 128});
  for (std::int64_t n = 0; n < 64; ++n) {
    for (std::int64_t d = 0; d < kDim; ++d) input.set_q(0, 0, n, d, d == 0 ? 4.0F : 0.0F);
  }
  for (std::int64_t n = 0; n < 128; ++n) {
    for (std::int64_t d = 0; d < kDim; ++d) {
      input.set_k(0, 0, n, d, d == 0 && (n / 16 == 1 || n / 16 == 2) ? -8 * std::log(2.0F) : 0.0F);
    }
  }
  const auto attend = [&](const std::string& spec) {
    return test::attend(*make_method("sparge:theta=1,block_q=64,block_k=16," + spec), input);
  };
  const test::Attended all = attend("online_skip=false");
  EXPECT_EQ(all.report.skipped_pairs, 0);
  EXPECT_TRUE(attend("lambda=8.1").o == attend("lambda=1e30").o);
  EXPECT_EQ(attend("lambda=8.1").report.skipped_pairs, 0);
  const test::Attended skipped = attend("lambda=7.9");
  EXPECT_EQ(skipped.report.skipped_pairs, 64 * 32);
  // Row 0 sees keys 0..64: 33 of weight 1 and 32 of weight 2^-8; the skip takes the latter out of the sum.
  EXPECT_NEAR(all.lse[0], std::log(33 + 32 / 256.0), 1e-5);
  EXPECT_NEAR(skipped.lse[0], std::log(33.0), 1e-5);
  // Equal scores are not below the maximum, whatever lambda.
  EXPECT_EQ(attend("lambda=0").report.skipped_pairs, 64 * 32);
}

TEST(Sparge, RunsItsPlanWithoutTheSkip) {
  for (const CaseShape& shape : test::all_shapes()) {
    const AttentionCase input(shape);
    SCOPED_TRACE(shape.name);
    test::expect_attends_its_plan("sparge:theta=-0.5,cdf=0.5,block_q=32,block_k=16", input,
                                  shape.dtype == DType::f32 || shape.dtype == DType::f16 ? 2e-4 : 2e-2);
  }
}

TEST(Sparge, FullBudgetAndEveryShape) {
  for (const CaseShape& shape : test::all_shapes()) {
    const AttentionCase input(shape);
    SCOPED_TRACE(shape.name);
    for (const std::string spec : {"sparge:theta=1,cdf=0", "sparge:cdf=1", "sparge:rule=topk,topk=1,theta=-1"}) {
      test::expect_full_budget_is_dense(*make_method(spec), input);
    }
    for (const std::string spec :
         {"sparge:theta=-1,cdf=0,sink=false,block_q=32,block_k=16",
          "sparge:theta=-1,rule=topk,topk=0,sink=false,block_q=16,block_k=48,online_skip=false",
          "sparge:theta=0.1,cdf=0.5,block_q=16,block_k=16"}) {
      test::expect_plans_hold(*make_method(spec), input);
    }
  }
}

TEST(Sparge, UndefinedTokensAreKeptAndBadDataStaysFinite) {
  AttentionCase input({.name = "nan", .q_len = 256, .kv_len = 256});
  input.set_k(0, 0, 40, 0, std::nanf(""));
  for (const auto& mask : masks_of("sparge:theta=-1,cdf=0,block_q=16,block_k=16", input)) {
    for (std::int64_t n = 48; n < 256; ++n) ASSERT_TRUE(mask.at(n, 40));
  }
  for (const std::string spec : {"sparge", "sparge:theta=-1,cdf=0.3,lambda=0,block_q=32,block_k=16"}) {
    test::expect_finite_on_bad_data(spec, 300);
    test::expect_finite_on_bad_data(spec, 5);
  }
}

TEST(Sparge, BadParameters) {
  EXPECT_THROW(make_method("sparge:skip_rows=24"), Error);
  EXPECT_THROW(make_method("sparge:block_k=48"), Error);
  EXPECT_THROW(make_method("sparge:block_k=256"), Error);
  EXPECT_NO_THROW(make_method("sparge:block_k=48,online_skip=false"));
}

TEST(Sparge, ValuesOfHeads) {
  for (const std::int64_t batch : {1, 2}) {
    AttentionCase input({.name = "heads", .batch = batch, .q_heads = 4, .kv_heads = 2, .q_len = 300, .kv_len = 300});
    for (std::int64_t s = 0; s < batch; ++s) {  // a sink, below which tiles are skipped
      for (std::int64_t h = 0; h < 4; ++h) {
        for (std::int64_t n = 0; n < 300; ++n) input.set_q(s, h, n, 0, 6);
        input.set_k(s, h / 2, 0, 0, 12);
      }
    }
    const std::string common = "sparge:block_q=32,block_k=16,skip_rows=16";
    const std::string path = testing::TempDir() + "sparge_heads.json";
    std::ofstream(path) << R"([[{"theta": -1, "cdf": 0.5, "lambda": 1}, {"theta": 0.2, "cdf": 0.5, "lambda": 50},
                               {"theta": 1, "cdf": 0.5, "lambda": 50}, {"theta": -1, "cdf": 1, "lambda": 2}]])";
    const std::vector<std::string> own{"theta=-1,cdf=0.5,lambda=1", "theta=0.2,cdf=0.5,lambda=50",
                                       "theta=1,cdf=0.5,lambda=50", "theta=-1,cdf=1,lambda=2"};
    const auto method = make_method(std::string(common).append(",heads=").append(path));
    const auto masks = masks_of(*method, input);
    const test::Attended all = test::attend(*method, input);
    std::int64_t skipped = 0;
    for (std::int64_t head = 0; head < 4; ++head) {
      const auto alone = make_method(common + "," + own[static_cast<std::size_t>(head)]);
      const test::Attended expected = test::attend(*alone, input);
      for (std::int64_t s = 0; s < batch; ++s) {
        EXPECT_TRUE(masks[s * 4 + head] == masks_of(*alone, input)[s * 4 + head]) << head;
        for (std::int64_t i = 0; i < 300 * 8; ++i) {
          const std::int64_t at = (s * 4 + head) * 300 * 8 + i;
          ASSERT_EQ(all.o[at], expected.o[at]) << head;
        }
        for (std::int64_t i = 0; i < 300; ++i) {
          const std::int64_t at = (s * 4 + head) * 300 + i;
          ASSERT_EQ(all.lse[at], expected.lse[at]) << head;
        }
      }
      skipped += expected.report.skipped_pairs;
    }
    EXPECT_GT(all.report.skipped_pairs, 0);
    EXPECT_LT(all.report.skipped_pairs, skipped);
    EXPECT_THROW(make_method("sparge:rule=topk,heads=" + path), Error);
    std::ofstream(path) << R"([[{"theta": 2, "cdf": 0.5, "lambda": 1}]])";
    EXPECT_THROW(make_method("sparge:heads=" + path), Error) << "2 is no cosine";
    std::filesystem::remove(path);
  }
}

}  // namespace
}  // namespace tessera
