// gna against the formula of the paper, pair by pair, and its plans against the simulator.
#include <gtest/gtest.h>

#include <cmath>

#include "core/error.h"
#include "methods/masks.h"
#include "score/neighborhood_simulator.h"
#include "tessera/gradient.h"

namespace tessera {
namespace {

using test::AttentionCase;
using test::masks_of;
using test::masks_where;
using test::position;

using Values = std::array<std::int64_t, 3>;

struct Setting {
  Values window;
  Values stride{1, 1, 1};
  Values dilation{1, 1, 1};
  Values causal{0, 0, 0};
};

std::string text_of(const Values& values) {
  return std::to_string(values[0]) + "x" + std::to_string(values[1]) + "x" + std::to_string(values[2]);
}

std::string spec_of(const Setting& setting) {
  return "gna:window=" + text_of(setting.window) + ",stride=" + text_of(setting.stride) +
         ",dilation=" + text_of(setting.dilation) + ",causal=" + text_of(setting.causal);
}

/// The paper's mask on one axis, written out anew.
bool axis_allows(const Setting& setting, const Values& extent, int a, std::int64_t x, std::int64_t y) {
  const std::int64_t dilation = setting.dilation[a];
  if (x % dilation != y % dilation) return false;
  std::int64_t n = 0;
  for (std::int64_t other = x % dilation; other < extent[a]; other += dilation) ++n;
  const std::int64_t i = x / dilation;
  const std::int64_t j = y / dilation;
  const std::int64_t w = std::min(n, setting.window[a] == 0 ? extent[a] : setting.window[a]);
  const std::int64_t s = std::min(setting.stride[a], w);
  if (setting.causal[a] == 1) {
    const std::int64_t leader = std::min(i / s * s + s - 1, n - 1);
    return j <= i && j > leader - w;
  }
  std::int64_t begin = std::min(i / s * s + s / 2, n - 1) - w / 2;
  if (begin < 0) begin = 0;
  if (begin > n - w) begin = n - w;
  return j >= begin && j < begin + w;
}

bool allows(const Setting& setting, const TokenGrid& grid, std::int64_t p, std::int64_t key) {
  const std::int64_t x = p - grid.prefix;
  const std::int64_t y = key - grid.prefix;
  const auto outside = [&](std::int64_t cell) { return cell < 0 || cell >= grid.cells(); };
  if (outside(x) || outside(y)) return true;
  const auto at = [&](std::int64_t cell) {
    return Values{cell / (grid.extent[1] * grid.extent[2]), cell / grid.extent[2] % grid.extent[1],
                  cell % grid.extent[2]};
  };
  for (int a = 0; a < 3; ++a) {
    if (!axis_allows(setting, grid.extent, a, at(x)[a], at(y)[a])) return false;
  }
  return true;
}

/// A case on a grid; queries are the last q_len tokens.
AttentionCase on_grid(const TokenGrid& grid, bool causal = false, std::int64_t q_len = 0) {
  AttentionCase input(
      {.name = "grid", .q_len = q_len == 0 ? grid.tokens() : q_len, .kv_len = grid.tokens(), .causal = causal});
  input.problem.grid = grid;
  return input;
}

void expect_formula(const Setting& setting, const AttentionCase& input, const std::string& tiles = "") {
  const auto expected = masks_where(input, [&](auto s, auto, auto n, auto j) {
    return input.allowed(s, n, j) && allows(setting, *input.problem.grid, position(input, s, n), j);
  });
  EXPECT_TRUE(masks_of(spec_of(setting) + tiles, input) == expected)
      << spec_of(setting) << tiles << " on " << text_of(input.problem.grid->extent) << " with "
      << input.problem.grid->prefix << " + " << input.problem.grid->suffix << " text tokens, queries "
      << input.problem.q_len << ", causal " << input.problem.causal;
}

const std::vector<Setting> kSettings{
    {.window = {3, 3, 3}},
    {.window = {2, 4, 5}, .stride = {1, 2, 5}},
    {.window = {0, 3, 4}, .stride = {1, 3, 2}},
    {.window = {2, 2, 2}, .stride = {1, 1, 2}, .dilation = {2, 1, 3}},
    {.window = {3, 2, 4}, .stride = {2, 1, 2}, .causal = {1, 0, 0}},
    {.window = {2, 3, 3}, .stride = {2, 2, 1}, .dilation = {1, 2, 1}, .causal = {1, 0, 1}},
    {.window = {100, 100, 100}, .stride = {7, 1, 2}},
};

TEST(Gna, IsTheFormulaOnEveryGrid) {
  for (const TokenGrid& grid : {TokenGrid{{4, 6, 8}, 0, 0}, TokenGrid{{1, 9, 11}, 0, 5}, TokenGrid{{1, 1, 130}, 3, 0},
                                TokenGrid{{5, 7, 3}, 4, 9}, TokenGrid{{1, 1, 1}, 0, 0}, TokenGrid{{13, 1, 2}, 0, 0}}) {
    for (const Setting& setting : kSettings) {
      const AttentionCase input = on_grid(grid);
      expect_formula(setting, input);
      expect_formula(setting, input, ",tile_q=2x3x4,tile_k=1x4x5");
      expect_formula(setting, input, ",tile_q=16,tile_k=2x8x8");
    }
  }
}

TEST(Gna, IsTheFormulaForChunksAndRasterCausality) {
  const TokenGrid grid{{3, 5, 7}, 4, 6};
  for (const Setting& setting : kSettings) {
    for (const std::int64_t queries : {1, 6, 50, 115}) {
      expect_formula(setting, on_grid(grid, false, queries));
      expect_formula(setting, on_grid(grid, true, queries));
    }
  }
}

TEST(Gna, APlainSequenceIsOneAxis) {
  const AttentionCase causal({.name = "plain", .q_len = 90, .kv_len = 150});
  const auto sliding = masks_where(causal, [&](auto s, auto, auto n, auto j) {
    const std::int64_t p = position(causal, s, n);
    return j <= p && j > p - 20;
  });
  EXPECT_TRUE(masks_of("gna:window=20,stride=1", causal) == sliding);
}

TEST(Gna, VariableLengthsAreGridsOfTheirOwn) {
  const AttentionCase input(
      {.name = "varlen", .causal = false, .q_lens = {130, 0, 1, 70}, .kv_lens = {260, 10, 40, 70}});
  const auto masks = masks_of("gna:window=20,stride=4", input);
  const auto expected = masks_where(input, [&](auto s, auto, auto n, auto j) {
    return axis_allows({.window = {1, 1, 20}, .stride = {1, 1, 4}}, {1, 1, input.problem.kv_len_of(s)}, 2,
                       position(input, s, n), j);
  });
  EXPECT_TRUE(masks == expected);
}

TEST(Gna, WholeWindowIsDense) {
  const AttentionCase input = on_grid({{3, 4, 5}, 2, 3});
  for (const char* spec : {"gna:window=0,stride=1", "gna:window=3x4x5,stride=1", "gna:window=3x4x5,stride=3x4x5",
                           "gna:window=99x99x99,stride=2"}) {
    test::expect_full_budget_is_dense(*make_method(spec), input);
  }
}

TEST(Gna, EveryRowHasTheWholeWindowAndStrideGroupsAgree) {
  const TokenGrid grid{{5, 6, 9}, 0, 0};
  const auto mask = masks_of("gna:window=3x4x5,stride=2x3x4", on_grid(grid))[0];
  for (std::int64_t n = 0; n < grid.cells(); ++n) {
    std::int64_t kept = 0;
    for (std::int64_t j = 0; j < grid.cells(); ++j) kept += mask.at(n, j) ? 1 : 0;
    ASSERT_EQ(kept, 3 * 4 * 5) << "query " << n;
    const std::int64_t t = n / 54 / 2 * 2;
    const std::int64_t h = n / 9 % 6 / 3 * 3;
    const std::int64_t w = n % 9 / 4 * 4;
    const std::int64_t first = (t * 6 + h) * 9 + w;
    for (std::int64_t j = 0; j < grid.cells(); ++j) ASSERT_EQ(mask.at(n, j), mask.at(first, j)) << n << ", " << j;
  }
}

TEST(Gna, StrideOfTheWindowMakesSeparateWindows) {
  const AttentionCase input = on_grid({{4, 6, 10}, 0, 0});
  const auto windows = masks_where(input, [](auto, auto, auto n, auto j) {
    const auto window = [](std::int64_t cell) { return Values{cell / 60 / 2, cell / 10 % 6 / 3, cell % 10 / 5}; };
    return window(n) == window(j);
  });
  EXPECT_TRUE(masks_of("gna:window=2x3x5,stride=2x3x5", input) == windows);
}

TEST(Gna, TransposeOfThePlanIsTheInverseMap) {
  const TokenGrid grid{{1, 1, 97}, 0, 0};
  const score::NeighborhoodAxis axis{.length = 97, .window = 13, .stride = 4};
  const Plan plan = make_method("gna:window=13,stride=4,tile_q=1,tile_k=1")->plan(on_grid(grid).problem, {}, {});
  const PlanTranspose turned = transpose(plan);
  ASSERT_EQ(turned.tile_k, 1);
  ASSERT_EQ(plan.tile_q, 1);
  for (std::int64_t key = 0; key < 97; ++key) {
    const score::Interval queries = axis.queries_of(key, 97);
    std::vector<std::int32_t> expected;
    for (std::int64_t query = queries.begin; query < queries.end; ++query) {
      expected.push_back(static_cast<std::int32_t>(query));
    }
    const std::vector<std::int32_t> rows(turned.rows.begin() + turned.offsets[key],
                                         turned.rows.begin() + turned.offsets[key + 1]);
    EXPECT_EQ(rows, expected) << "key " << key;
  }
}

TEST(Gna, ThePlanCostsWhatTheSimulatorSays) {
  struct Case {
    TokenGrid grid;
    Setting setting;
    score::TileShapes tiles;
  };
  for (const Case& c :
       {Case{{{6, 8, 16}, 0, 0}, {.window = {3, 4, 8}, .stride = {1, 1, 1}}, {{2, 4, 4}, {2, 4, 4}}},
        Case{{{6, 8, 16}, 0, 0}, {.window = {4, 4, 8}, .stride = {2, 4, 4}}, {{2, 4, 4}, {2, 4, 4}}},
        Case{{{6, 8, 16}, 0, 0}, {.window = {3, 5, 7}, .stride = {2, 3, 1}}, {{1, 4, 16}, {3, 3, 5}}},
        Case{{{6, 8, 16}, 0, 0},
             {.window = {2, 3, 4}, .stride = {1, 2, 1}, .dilation = {1, 2, 2}, .causal = {1, 0, 0}},
             {{2, 4, 4}, {2, 2, 4}}},
        Case{{{1, 24, 30}, 0, 0}, {.window = {1, 7, 9}, .stride = {1, 1, 3}}, {{1, 8, 10}, {1, 4, 16}}}}) {
    score::Neighborhood axes{};
    for (int a = 0; a < 3; ++a) {
      axes[a] = {.length = c.grid.extent[a],
                 .window = std::min(c.setting.window[a], c.grid.extent[a]),
                 .stride = c.setting.stride[a],
                 .dilation = c.setting.dilation[a],
                 .causal = c.setting.causal[a] == 1};
    }
    const score::NeighborhoodCost cost = score::simulate(axes, c.tiles);
    const AttentionCase input = on_grid(c.grid);
    const std::string spec = spec_of(c.setting) + ",tile_q=" + text_of(c.tiles.q) + ",tile_k=" + text_of(c.tiles.k);
    const Plan plan = make_method(spec)->plan(input.problem, {}, {});
    const PlanStatistics stats = statistics(plan);
    EXPECT_EQ(stats.executed_pairs, input.problem.q_heads * cost.visited_pairs) << spec;
    EXPECT_EQ(stats.planned_pairs, input.problem.q_heads * cost.pairs) << spec;
    EXPECT_EQ(plan.mask_words.empty(), cost.visited_pairs == cost.pairs) << spec;
    EXPECT_TRUE(plan.mask_words.empty() || !cost.block_sparse) << spec;
  }
}

TEST(Gna, EqualMasksAreStoredOnce) {
  // In the interior every query tile cuts its key tiles alike.
  const auto words = [](std::int64_t columns) {
    return make_method("gna:window=5x5,stride=1,tile_q=8x8,tile_k=8x8")
        ->plan(on_grid({{1, 32, columns}, 0, 0}).problem, {}, {})
        .mask_words.size();
  };
  EXPECT_EQ(words(64), words(128));
}

TEST(Gna, PermutedPlansRun) {
  for (const TokenGrid& grid : {TokenGrid{{4, 6, 8}, 3, 5}, TokenGrid{{3, 5, 7}, 0, 0}}) {
    const AttentionCase input = on_grid(grid);
    const Problem& problem = input.problem;
    const Setting setting{.window = {2, 3, 4}, .stride = {1, 2, 1}};
    const auto size = static_cast<std::size_t>(problem.q_heads * problem.q_len * problem.value_dim);
    std::vector<float> o(size);
    make_method(spec_of(setting))
        ->attend(problem, input.inputs,
                 {mutable_view_of(o.data(), DType::f32, {1, problem.q_heads, problem.q_len, problem.value_dim}), {}},
                 {});
    for (std::int64_t h = 0; h < problem.q_heads; ++h) {
      for (std::int64_t n = 0; n < problem.q_len; ++n) {
        const auto p = input.probabilities(0, h, n);
        std::vector<double> expected(static_cast<std::size_t>(problem.value_dim));
        double sum = 0;
        for (std::int64_t j = 0; j < problem.kv_len; ++j) {
          if (!allows(setting, grid, n, j)) continue;
          sum += p[j];
          for (std::int64_t d = 0; d < problem.value_dim; ++d) {
            expected[d] += p[j] * load_as_float(input.inputs.v.row(0, 0, j), DType::f32, d);
          }
        }
        for (std::int64_t d = 0; d < problem.value_dim; ++d) {
          ASSERT_NEAR(o[(h * problem.q_len + n) * problem.value_dim + d], expected[d] / sum, 1e-4);
        }
      }
    }
  }
}

TEST(Gna, GradientsAreThoseOfTheMask) {
  for (const TokenGrid& grid : {TokenGrid{{3, 4, 6}, 3, 5}, TokenGrid{{3, 5, 7}, 0, 0}}) {
    for (const bool causal : {false, true}) {
      AttentionCase input({.name = "grid",
                           .q_heads = 4,
                           .kv_heads = 2,
                           .q_len = grid.tokens(),
                           .kv_len = grid.tokens(),
                           .causal = causal});
      input.problem.grid = grid;
      const Problem& problem = input.problem;
      const Setting setting{.window = {2, 3, 4}, .stride = {1, 2, 1}, .dilation = {1, 1, 2}, .causal = {1, 0, 0}};
      const auto method = make_method(spec_of(setting));
      const std::array<std::int64_t, 4> shape{1, 4, problem.q_len, problem.value_dim};
      std::vector<float> o(static_cast<std::size_t>(4 * problem.q_len * problem.value_dim));
      std::vector<float> lse(static_cast<std::size_t>(4 * problem.q_len));
      std::vector<float> d_o(o.size());
      for (std::size_t i = 0; i < d_o.size(); ++i) d_o[i] = std::sin(static_cast<float>(i) * 1.3F);
      method->attend(problem, input.inputs, {mutable_view_of(o.data(), DType::f32, shape), lse}, {});
      const SavedForward saved{view_of(o.data(), DType::f32, shape), lse, view_of(d_o.data(), DType::f32, shape), {}};
      struct Memory {
        std::vector<float> q, k, v;
      };
      const auto gradients_of = [&](Memory& memory) {
        const auto view = [](std::vector<float>& values, const TensorView& like) {
          values.resize(static_cast<std::size_t>(like.shape[0] * like.shape[1] * like.shape[2] * like.shape[3]));
          return mutable_view_of(values.data(), DType::f32, like.shape);
        };
        Gradients gradients;
        gradients.d_q = view(memory.q, input.inputs.q);
        gradients.d_k = view(memory.k, input.inputs.k);
        gradients.d_v = view(memory.v, input.inputs.v);
        return gradients;
      };
      Memory actual, expected;
      method->backward(problem, input.inputs, saved, gradients_of(actual), {});
      // The mask by the formula, tokens in their own order, in float64.
      std::vector<std::uint8_t> mask;
      for (const auto& head : masks_where(input, [&](auto s, auto, auto n, auto j) {
             return input.allowed(s, n, j) && allows(setting, grid, position(input, s, n), j);
           })) {
        mask.insert(mask.end(), head.bits.begin(), head.bits.end());
      }
      RunOptions reference;
      reference.kernel = KernelKind::reference;
      run_backward(plan_from_mask(problem, mask, 16, 16), input.inputs, saved, gradients_of(expected), reference);
      const auto compare = [](const std::vector<float>& a, const std::vector<float>& b) {
        ASSERT_EQ(a.size(), b.size());
        for (std::size_t i = 0; i < a.size(); ++i) ASSERT_NEAR(a[i], b[i], 1e-4) << i;
      };
      compare(actual.q, expected.q);
      compare(actual.k, expected.k);
      compare(actual.v, expected.v);
    }
  }
}

TEST(Gna, RefusesWhatItCannotRead) {
  for (const char* spec : {"gna:window=a", "gna:window=3x", "gna:window=1x2x3x4", "gna:window=-3", "gna:stride=0",
                           "gna:window=4,stride=5", "gna:dilation=0", "gna:causal=2", "gna:tile_q=8x8x8",
                           "gna:tile_k=0x2", "gna:tile_q=99999999x99999999x99999999"}) {
    EXPECT_THROW(make_method(spec), Error) << spec;
  }
}

TEST(Gna, NeedsNoTensors) {
  Problem problem;
  problem.q_len = problem.kv_len = 16 * 24 * 40;
  problem.head_dim = problem.value_dim = 64;
  problem.grid = TokenGrid{{16, 24, 40}, 0, 0};
  EXPECT_NO_THROW(validate(make_method("gna")->plan(problem, {}, {})));
}

}  // namespace
}  // namespace tessera
