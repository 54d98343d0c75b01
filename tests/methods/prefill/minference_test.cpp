// MInference: lines found by the probe, rows built of them, block-sparse heads, per-head configuration.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <numeric>
#include <set>

#include "methods/masks.h"
#include "score/row_probe.h"
#include "score/vertical_slash.h"

namespace tessera {
namespace {

using test::AttentionCase;
using test::masks_of;

/// The set of keys of one query tile by the text of the paper's index building, on plain sets.
std::set<std::int64_t> keys_of_tile(const std::vector<std::int32_t>& columns, std::vector<std::int32_t> offsets,
                                    std::int64_t m0) {
  std::sort(offsets.begin(), offsets.end(), std::greater<>());
  std::vector<std::pair<std::int64_t, std::int64_t>> runs;
  for (const std::int64_t offset : offsets) {
    if (offset >= m0 + 64) continue;
    const std::int64_t begin = std::max<std::int64_t>(0, m0 - offset);
    const std::int64_t end = begin + 64;
    if (runs.empty() || end > runs.back().second + 64) {
      runs.emplace_back(begin, end);
    } else if (end > runs.back().second) {
      runs.back().second += 64;
    }
  }
  std::set<std::int64_t> keys;
  for (const auto& [begin, end] : runs) {
    for (std::int64_t j = begin; j < end; ++j) keys.insert(j);
  }
  for (const std::int64_t column : columns) {
    if (column < m0) keys.insert(column);
  }
  return keys;
}

TEST(MInference, RowsAreTheMergedRunsAndTheColumnsOutside) {
  for (const std::int64_t chunk : {900, 333}) {
    const AttentionCase input({.name = "rows", .q_len = chunk, .kv_len = 900}, 5);
    const auto masks = masks_of("minference:v=60,sl=130", input);
    for (std::int64_t h = 0; h < 2; ++h) {
      score::LineScores lines;
      score::ProbeBuffers buffers;
      score::probe_rows(input.problem, input.inputs, 0, h, chunk - 64, 64, true, lines, buffers);
      const auto columns = score::best_lines(lines.columns, 60, 30);
      const auto offsets = score::best_lines(lines.offsets, 130, 100);
      EXPECT_EQ(columns.size(), 60U);
      EXPECT_EQ(offsets.size(), 130U);
      for (std::int64_t j = 0; j < 30; ++j) EXPECT_EQ(columns[j], j) << "the first 30 columns are forced";
      for (std::int64_t o = 0; o < 100; ++o) EXPECT_EQ(offsets[o], o) << "the first 100 distances are forced";
      for (std::int64_t n = 0; n < chunk; ++n) {
        const std::int64_t p = 900 - chunk + n;
        const auto keys = keys_of_tile(columns, offsets, p - n % 64);
        for (std::int64_t j = 0; j < 900; ++j) {
          ASSERT_EQ(masks[h].at(n, j), j <= p && keys.count(j) == 1)
              << "head " << h << ", query " << n << ", key " << j;
        }
      }
    }
  }
}

TEST(MInference, BudgetBelowTheForcedCountKeepsTheNearestDistances) {
  std::vector<float> scores(500);
  std::iota(scores.begin(), scores.end(), 0.0F);  // far distances score best
  const auto offsets = score::best_lines(scores, 50, 100);
  ASSERT_EQ(offsets.size(), 50U);
  EXPECT_EQ(offsets.front(), 0);
  EXPECT_EQ(offsets.back(), 49);
}

TEST(MInference, PlantedColumnIsKept) {
  AttentionCase input({.name = "column", .q_heads = 1, .q_len = 1000, .kv_len = 1000});
  for (std::int64_t n = 0; n < 1000; ++n) input.set_q(0, 0, n, 0, 4);
  input.set_k(0, 0, 321, 0, 8);
  const auto mask = masks_of("minference:v=31,sl=50", input)[0];
  for (std::int64_t n = 321; n < 1000; ++n) ASSERT_TRUE(mask.at(n, 321));
}

TEST(MInference, ToeplitzScoresKeepTheTopOfTheProfile) {
  // q_p . k_j = cos(w (p - j)) per frequency pair: a function of the distance alone.
  const std::int64_t tokens = 800;
  AttentionCase input({.name = "toeplitz", .q_heads = 1, .q_len = tokens, .kv_len = tokens, .head_dim = 64});
  const auto profile = [&](std::int64_t distance) {
    double sum = 0;
    for (int f = 1; f <= 32; ++f) sum += std::cos(0.0071 * f * static_cast<double>(distance - 500));
    return sum;
  };
  for (std::int64_t n = 0; n < tokens; ++n) {
    for (int f = 0; f < 32; ++f) {
      const double w = 0.0071 * (f + 1);
      input.set_q(0, 0, n, 2 * f, static_cast<float>(8 * std::cos(w * (static_cast<double>(n) - 500))));
      input.set_q(0, 0, n, 2 * f + 1, static_cast<float>(8 * std::sin(w * (static_cast<double>(n) - 500))));
      input.set_k(0, 0, n, 2 * f, static_cast<float>(std::cos(w * static_cast<double>(n))));
      input.set_k(0, 0, n, 2 * f + 1, static_cast<float>(std::sin(w * static_cast<double>(n))));
    }
  }
  score::LineScores lines;
  score::ProbeBuffers buffers;
  score::probe_rows(input.problem, input.inputs, 0, 0, tokens - 64, 64, true, lines, buffers);
  const auto offsets = score::best_lines(lines.offsets, 110, 100);
  std::vector<std::int32_t> far(offsets.begin() + 100, offsets.end());
  std::vector<std::int32_t> expected(700);
  std::iota(expected.begin(), expected.end(), 100);
  std::sort(expected.begin(), expected.end(), [&](int a, int b) { return profile(a) > profile(b); });
  expected.resize(10);
  std::sort(expected.begin(), expected.end());
  EXPECT_EQ(far, expected);
}

TEST(MInference, BlockSparseKeepsTheBestTilesByPooledScores) {
  const AttentionCase input({.name = "blocks", .q_heads = 2, .kv_heads = 1, .q_len = 500, .kv_len = 500}, 3);
  const auto masks = masks_of("minference:pattern=block_sparse,k=3", input);
  const auto mean = [&](bool query, std::int64_t h, std::int64_t t, std::int64_t d) {
    double sum = 0;
    for (std::int64_t n = t * 64; n < std::min<std::int64_t>(500, t * 64 + 64); ++n) {
      sum += query ? input.q(0, h, n, d) : input.k(0, 0, n, d);
    }
    return sum / 64;
  };
  for (std::int64_t h = 0; h < 2; ++h) {
    for (std::int64_t i = 0; i < 8; ++i) {
      std::vector<std::pair<double, std::int64_t>> scores;
      for (std::int64_t j = 0; j <= i; ++j) {
        double score = 0;
        for (std::int64_t d = 0; d < 16; ++d) score += mean(true, h, i, d) * mean(false, h, j, d);
        scores.emplace_back(-score, j);
      }
      std::sort(scores.begin(), scores.end());
      std::set<std::int64_t> kept;
      for (std::size_t r = 0; r < std::min<std::size_t>(3, scores.size()); ++r) kept.insert(scores[r].second);
      const std::int64_t last = std::min<std::int64_t>(499, i * 64 + 63);
      for (std::int64_t j = 0; j <= i; ++j) {
        ASSERT_EQ(masks[h].at(last, j * 64), kept.count(j) == 1) << "head " << h << ", tile " << i << ", " << j;
      }
    }
  }
}

TEST(MInference, HeadsFollowTheirConfiguration) {
  const std::string path = testing::TempDir() + "minference.json";
  std::ofstream(path) << R"([{}, {"0": ["stream_llm", 5, 70, 1.0], "1": ["block_sparse", 1000, 1, 1.0],
                             "2": ["vertical_and_slash", 30, 60, 0.9]}])";
  const AttentionCase input({.name = "config", .q_heads = 4, .q_len = 500, .kv_len = 500});
  const auto method = make_method("minference:v=40,sl=200,k=2,config=" + path);
  const auto first = masks_of(*method, input, 0, 0);
  const auto second = masks_of(*method, input, 0, 1);
  EXPECT_TRUE(first == masks_of("minference:v=40,sl=200", input)) << "heads without an entry take the defaults";
  EXPECT_TRUE(second[0] == masks_of("minference:pattern=stream_llm,n_init=5,n_local=70", input)[0]);
  EXPECT_TRUE(second[1] == masks_of("minference:pattern=block_sparse,k=2", input)[1]);
  EXPECT_TRUE(second[2] == masks_of("minference:v=30,sl=60", input)[2]);
  EXPECT_TRUE(second[3] == first[3]);
  std::filesystem::remove(path);
}

TEST(MInference, FirstLayersMayRunDense) {
  const AttentionCase input({.name = "layers", .q_len = 400, .kv_len = 400});
  const auto method = make_method("minference:v=30,sl=50,dense_layers=2");
  EXPECT_TRUE(masks_of(*method, input, 0, 1) == test::dense_masks(input));
  EXPECT_FALSE(masks_of(*method, input, 0, 2) == test::dense_masks(input));
}

}  // namespace
}  // namespace tessera
