// draft: the map in float64, its threshold over the whole head, and the tokens that follow from both.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "methods/diffusion/pooled_reference.h"

namespace tessera {
namespace {

using test::AttentionCase;
using test::Result;

AttentionCase on_grid(const TokenGrid& grid, std::int64_t q_len = 0) {
  AttentionCase input({.name = "grid",
                       .q_heads = 2,
                       .kv_heads = 1,
                       .q_len = q_len == 0 ? grid.tokens() : q_len,
                       .kv_len = grid.tokens(),
                       .causal = false});
  input.problem.grid = grid;
  return input;
}

/// Region (frame, row of regions, column of regions) of a token as one number; -1 for text.
std::int64_t region_of(const TokenGrid& grid, std::int64_t token, std::int64_t rows, std::int64_t columns) {
  const std::int64_t cell = token - grid.prefix;
  if (cell < 0 || cell >= grid.cells()) return -1;
  const auto [frames, height, width] = grid.extent;
  const std::int64_t t = cell / (height * width);
  const std::int64_t h = cell / width % height / rows;
  const std::int64_t w = cell % width / columns;
  return (t * ((height + rows - 1) / rows) + h) * ((width + columns - 1) / columns) + w;
}

/// The draft map in float64: rows of regions without queries are empty.
std::vector<std::vector<double>> draft_map(const AttentionCase& input, std::int64_t h, std::int64_t rows,
                                           std::int64_t columns) {
  const Problem& problem = input.problem;
  const TokenGrid& grid = *problem.grid;
  std::vector<std::vector<std::int64_t>> key_members;
  std::vector<std::vector<std::int64_t>> query_members;
  const auto add = [](std::vector<std::vector<std::int64_t>>& members, std::int64_t region, std::int64_t token) {
    if (region < 0) return;
    members.resize(std::max(members.size(), static_cast<std::size_t>(region + 1)));
    members[region].push_back(token);
  };
  for (std::int64_t j = 0; j < problem.kv_len; ++j) add(key_members, region_of(grid, j, rows, columns), j);
  query_members.resize(key_members.size());
  for (std::int64_t n = 0; n < problem.q_len; ++n) {
    add(query_members, region_of(grid, problem.q_offset_of(0) + n, rows, columns), n);
  }
  std::vector<std::vector<double>> map(key_members.size());
  for (std::size_t i = 0; i < map.size(); ++i) {
    if (query_members[i].empty()) continue;
    double sum = 0;
    for (const auto& members : key_members) {
      const std::vector<double> mean = test::mean_of(input, 0, h / problem.group(), members, false);
      double score = 0;
      for (const std::int64_t n : query_members[i]) {
        score += test::score_of(input, 0, h, n, mean) / static_cast<double>(query_members[i].size());
      }
      map[i].push_back(std::exp(score));
      sum += map[i].back();
    }
    for (double& x : map[i]) x /= sum;
  }
  return map;
}

void expect_definition(const AttentionCase& input, const std::string& region, std::int64_t rows, std::int64_t columns,
                       double sparsity) {
  const auto method = make_method("draft:region=" + region + ",sparsity=" + std::to_string(sparsity));
  const auto masks = test::masks_of(*method, input);
  const TokenGrid& grid = *input.problem.grid;
  for (std::int64_t h = 0; h < input.problem.q_heads; ++h) {
    const auto map = draft_map(input, h, rows, columns);
    std::vector<double> values;
    for (const auto& row : map) values.insert(values.end(), row.begin(), row.end());
    std::sort(values.begin(), values.end());
    const auto dropped = static_cast<std::size_t>(sparsity * static_cast<double>(values.size()));
    const double threshold = dropped == 0 ? 0 : values[dropped - 1];
    for (std::int64_t n = 0; n < input.problem.q_len; ++n) {
      const std::int64_t i = region_of(grid, test::position(input, 0, n), rows, columns);
      for (std::int64_t j = 0; j < input.problem.kv_len; ++j) {
        const std::int64_t k = region_of(grid, j, rows, columns);
        const bool text = i < 0 || k < 0;
        if (!text && std::abs(map[i][k] / threshold - 1) < 1e-4) continue;  // float may round either way
        const bool kept = text || map[i][k] > threshold || map[i][k] == *std::max_element(map[i].begin(), map[i].end());
        ASSERT_EQ(masks[h].at(n, j), kept) << "head " << h << ", query " << n << ", key " << j << ", " << region;
      }
    }
  }
}

TEST(Draft, KeepsTheLargestEntriesOfTheMap) {
  for (const double sparsity : {0.0, 0.5, 0.9}) {
    expect_definition(on_grid({{3, 8, 8}, 0, 0}), "4x4", 4, 4, sparsity);
    expect_definition(on_grid({{2, 8, 12}, 5, 9}), "4x4", 4, 4, sparsity);
    expect_definition(on_grid({{2, 7, 10}, 3, 2}), "4x4", 4, 4, sparsity);     // regions cut by the edge
    expect_definition(on_grid({{4, 6, 6}, 0, 6}, 60), "3x2", 3, 2, sparsity);  // the last tokens only
  }
}

TEST(Draft, TheThresholdIsOneForTheHeadAndRowsKeepOne) {
  // One query region that is sure of its key region, all others indifferent: a budget per row would treat them alike.
  AttentionCase input = on_grid({{4, 4, 4}, 0, 0});
  for (std::int64_t n = 0; n < 64; ++n) {
    const std::int64_t region = n / 16;
    for (std::int64_t d = 0; d < 16; ++d) {
      input.set_q(0, 0, n, d, n < 16 && d == 0 ? 9.0F : 0.01F * static_cast<float>(region + 1));
      input.set_k(0, 0, n, d, region == 2 && d == 0 ? 9.0F : d == 1 ? 0.5F * static_cast<float>(region) : 0.0F);
    }
  }
  const auto mask = test::masks_of("draft:region=4x4,sparsity=0.8", input)[0];
  std::vector<int> kept;
  for (std::int64_t region = 0; region < 4; ++region) {
    int count = 0;
    for (std::int64_t j = 0; j < 64; j += 16) count += mask.at(region * 16, j) ? 1 : 0;
    kept.push_back(count);
    EXPECT_GE(count, 1) << "region " << region;
  }
  EXPECT_TRUE(mask.at(0, 32));
  EXPECT_EQ(kept[0], 1);
}

TEST(Draft, TiesKeepMore) {
  AttentionCase input = on_grid({{4, 4, 4}, 0, 0});
  for (std::int64_t n = 0; n < 64; ++n) {
    for (std::int64_t d = 0; d < 16; ++d) input.set_k(0, 0, n, d, 0);
  }
  EXPECT_TRUE(test::masks_of("draft:region=2x2,sparsity=0.9", input) == test::dense_masks(input));
}

TEST(Draft, RegionsAreDenseTilesOfTheGrid) {
  // Where the region divides the grid no mask is needed, and a region is one stretch of the order.
  const AttentionCase input = on_grid({{3, 16, 32}, 0, 0});
  const Plan plan = make_method("draft")->plan(input.problem, input.inputs, {});
  EXPECT_TRUE(plan.mask_words.empty());
  EXPECT_EQ(plan.tile_q, 128);
  for (std::int64_t i = 0; i < 128; ++i) {
    const std::int64_t token = plan.query_order[0][i];
    EXPECT_EQ(region_of(*input.problem.grid, token, 8, 16), 0);
  }
  EXPECT_LE(statistics(plan).density, 0.2);
}

TEST(Draft, OutputsAreInTheOrderOfTheInput) {
  const AttentionCase input = on_grid({{3, 7, 9}, 2, 5});
  const Result dense = test::attend(*make_method("dense"), input);
  const Result all = test::attend(*make_method("draft:region=4x4,sparsity=0"), input);
  for (std::size_t i = 0; i < dense.o.size(); ++i) ASSERT_NEAR(all.o[i], dense.o[i], 1e-5);
  const Result sparse = test::attend(*make_method("draft:region=4x4,sparsity=0.8"), input);
  const Result reference = test::attend(*make_method("draft:region=4x4,sparsity=0.8"), input, KernelKind::reference);
  for (std::size_t i = 0; i < dense.o.size(); ++i) ASSERT_NEAR(sparse.o[i], reference.o[i], 1e-5);
  EXPECT_EQ(sparse.o, test::attend(*make_method("draft:region=4x4,sparsity=0.8"), input, KernelKind::automatic, 1).o);
}

TEST(Draft, RefusesWhatItCannotRun) {
  for (const char* spec : {"draft:region=2x8x8", "draft:region=0x4", "draft:sparsity=1.1", "draft:region=4096x4"}) {
    EXPECT_THROW(make_method(spec), Error) << spec;
  }
  const AttentionCase causal({.name = "causal", .q_len = 40, .kv_len = 40});
  EXPECT_THROW(make_method("draft")->plan(causal.problem, causal.inputs, {}), Error);
}

}  // namespace
}  // namespace tessera
