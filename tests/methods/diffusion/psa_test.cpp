// psa: the softmax over raw and pooled keys in float64, the cut of the sorted blocks, and what follows from both.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <set>

#include "core/error.h"
#include "methods/diffusion/pooled_reference.h"
#include "score/token_order.h"
#include "tessera/gradient.h"

namespace tessera {
namespace {

using test::AttentionCase;
using test::CaseShape;
using test::Result;

constexpr std::array<std::int64_t, 4> kMembers{1, 2, 4, 8};

AttentionCase on_grid(const TokenGrid& grid, CaseShape shape) {
  shape.kv_len = grid.tokens();
  if (shape.q_len == 0) shape.q_len = grid.tokens();
  AttentionCase input(shape);
  input.problem.grid = grid;
  return input;
}

/// Output and LSE of every row by the paper's formula, over the keys that the plan names.
void expect_formula(const AttentionCase& input, const Result& result, double tolerance) {
  const Problem& problem = input.problem;
  const Plan& plan = result.plan;
  for (std::int64_t s = 0; s < problem.batch; ++s) {
    for (std::int64_t h = 0; h < problem.q_heads; ++h) {
      const std::int64_t kv_head = h / problem.group();
      const std::int64_t block = plan.block_of(s, h);
      const bool ordered = !plan.query_order.empty() && !plan.query_order[block].empty();
      for (std::int64_t place = 0; place < problem.q_len_of(s); ++place) {
        const std::int64_t n = ordered ? plan.query_order[block][place] : place;
        const std::int64_t position = problem.q_offset_of(s) + n;
        std::vector<double> expected(static_cast<std::size_t>(problem.value_dim));
        double sum = 0;
        for (const test::PooledKey& key : test::keys_of_row(plan, s, h, place / plan.tile_q, kMembers)) {
          const std::int64_t last = *std::max_element(key.members.begin(), key.members.end());
          if (problem.causal && last > position) continue;
          const double weight =
              std::exp(test::score_of(input, s, h, n, test::mean_of(input, s, kv_head, key.members, false))) *
              static_cast<double>(key.members.size());
          const std::vector<double> value = test::mean_of(input, s, kv_head, key.members, true);
          sum += weight;
          for (std::size_t d = 0; d < expected.size(); ++d) expected[d] += weight * value[d];
        }
        const std::int64_t row = test::output_row(problem, s, h, n);
        if (sum == 0) {
          ASSERT_EQ(result.lse[row], -std::numeric_limits<float>::infinity());
          continue;
        }
        ASSERT_NEAR(result.lse[row], std::log(sum), tolerance) << "sequence " << s << ", head " << h << ", query " << n;
        for (std::size_t d = 0; d < expected.size(); ++d) {
          ASSERT_NEAR(result.o[row * problem.value_dim + static_cast<std::int64_t>(d)], expected[d] / sum, tolerance)
              << "sequence " << s << ", head " << h << ", query " << n;
        }
      }
    }
  }
}

/// Level (index of kMembers, -1 = skipped) of every key block of a plan row.
std::vector<int> levels_of(const Plan& plan, std::int64_t block, std::int64_t tile) {
  const std::int64_t keys = plan.problem.kv_len_of(plan.sequence_of_block(block));
  std::vector<int> levels(static_cast<std::size_t>((keys + plan.tile_k - 1) / plan.tile_k), -1);
  for (const PlanEntry& entry : plan.row(plan.row_begin[block] + tile)) {
    for (std::int64_t i = entry.begin; i < entry.begin + entry.count; ++i) {
      levels[i * kMembers[entry.source] / plan.tile_k] = entry.source;
    }
  }
  return levels;
}

const std::string kSmall = "psa:block_q=32,block_k=16,pack=2,";
const std::string kMixed = kSmall + "rule=topk,end_1=0.25,end_2=0.5,end_4=0.75,end_8=0.9";

TEST(Psa, IsTheFormulaOverRawAndPooledKeys) {
  for (const std::string& spec : {kMixed, kSmall + "end_1=0.2,end_2=0.4,end_4=0.6,end_8=0.8,floor_1=0",
                                  kMixed + ",order=raster", kMixed + ",order=tile,tile=2x2x4"}) {
    SCOPED_TRACE(spec);
    const auto method = make_method(spec);
    for (const TokenGrid& grid : {TokenGrid{{4, 6, 8}, 0, 0}, TokenGrid{{3, 5, 7}, 9, 20}}) {
      for (const bool causal : {false, true}) {
        const AttentionCase input = on_grid(grid, {.name = "grid", .q_heads = 2, .kv_heads = 1, .causal = causal});
        const Result result = test::attend(*method, input);
        EXPECT_EQ(result.plan.sources.size(), 4U);
        expect_formula(input, result, 2e-4);
      }
    }
  }
}

TEST(Psa, IsTheFormulaForEveryKindOfInput) {
  const auto method = make_method(kMixed);
  for (const CaseShape& shape : test::all_shapes()) {
    SCOPED_TRACE(shape.name);
    const AttentionCase input(shape);
    const Result result = test::attend(*method, input);
    const double tolerance = shape.dtype == DType::bf16 ? 4e-2 : shape.dtype == DType::f16 ? 6e-3 : 2e-4;
    expect_formula(input, result, tolerance);
    EXPECT_EQ(result.o, test::attend(*method, input, KernelKind::automatic, 1).o);
  }
}

TEST(Psa, EveryLevelIsReallyUsed) {
  const AttentionCase input = on_grid({{4, 8, 8}, 0, 0}, {.name = "grid", .causal = false});
  const Result result = test::attend(*make_method(kMixed), input);
  std::set<int> seen;
  for (const int level : levels_of(result.plan, 0, 0)) seen.insert(level);
  EXPECT_EQ(seen, (std::set<int>{-1, 0, 1, 2, 3}));
}

TEST(Psa, ConstantGroupsOfEightMakeEveryLevelExact) {
  AttentionCase input({.name = "constant", .q_len = 96, .kv_len = 96, .causal = false});
  std::vector<float> values(static_cast<std::size_t>(96 * 8));
  for (std::int64_t j = 0; j < 96; ++j) {
    const std::int64_t group = j / 8;
    for (std::int64_t d = 0; d < 16; ++d) input.set_k(0, 0, j, d, std::sin(static_cast<float>(group * 16 + d)));
    for (std::int64_t d = 0; d < 8; ++d) values[j * 8 + d] = std::cos(static_cast<float>(group * 8 + d));
  }
  input.inputs.v = view_of(values.data(), DType::f32, {1, 1, 96, 8});
  const Result dense = test::attend(*make_method("dense"), input);
  for (const char* ends : {"end_1=0,end_2=1,end_4=1,end_8=1", "end_1=0,end_2=0,end_4=1,end_8=1",
                           "end_1=0,end_2=0,end_4=0,end_8=1", "end_1=0.2,end_2=0.4,end_4=0.7,end_8=1"}) {
    const Result result = test::attend(*make_method(kSmall + "rule=topk," + ends), input);
    for (std::size_t i = 0; i < dense.o.size(); ++i) ASSERT_NEAR(result.o[i], dense.o[i], 1e-5) << ends;
    for (std::size_t i = 0; i < dense.lse.size(); ++i) ASSERT_NEAR(result.lse[i], dense.lse[i], 1e-5) << ends;
  }
}

TEST(Psa, PoolingNeverRaisesTheLogSumExp) {
  const AttentionCase input({.name = "jensen", .q_len = 160, .kv_len = 160, .causal = false});
  const Result dense = test::attend(*make_method("dense"), input);
  std::vector<float> finer = dense.lse;
  for (const char* ends :
       {"end_1=0,end_2=1,end_4=1,end_8=1", "end_1=0,end_2=0,end_4=1,end_8=1", "end_1=0,end_2=0,end_4=0,end_8=1"}) {
    const Result pooled = test::attend(*make_method(kSmall + "rule=topk," + ends), input);
    double drop = 0;
    for (std::size_t i = 0; i < finer.size(); ++i) {
      ASSERT_LE(pooled.lse[i], finer[i] + 1e-5) << ends;
      drop += finer[i] - pooled.lse[i];
    }
    EXPECT_GT(drop, 0.01) << ends;
    finer = pooled.lse;
  }
}

TEST(Psa, DensityIsTheSumOverLevels) {
  const AttentionCase input({.name = "density", .q_heads = 1, .q_len = 320, .kv_len = 320, .causal = false});
  const Result result = test::attend(*make_method(kMixed), input);
  // 20 blocks: 5 raw, 5 by 2, 5 by 4, 3 by 8, 2 skipped.
  EXPECT_NEAR(statistics(result.plan).density, (5.0 + 5 / 2.0 + 5 / 4.0 + 3 / 8.0) / 20, 1e-9);
}

/// exp(largest score of the block - largest of the row), largest over the rows of the tile; float64.
std::vector<double> scores_of(const AttentionCase& input, std::int64_t tile, std::int64_t block_q,
                              std::int64_t block_k) {
  const std::int64_t keys = input.problem.kv_len;
  std::vector<double> scores(static_cast<std::size_t>((keys + block_k - 1) / block_k), 0.0);
  for (std::int64_t n = tile * block_q; n < std::min((tile + 1) * block_q, input.problem.q_len); ++n) {
    const auto p = input.probabilities(0, 0, n);
    const double most = *std::max_element(p.begin(), p.end());
    for (std::int64_t j = 0; j < keys; ++j) scores[j / block_k] = std::max(scores[j / block_k], p[j] / most);
  }
  return scores;
}

TEST(Psa, CutsTheSortedBlocks) {
  const AttentionCase input({.name = "sorted", .q_heads = 1, .q_len = 200, .kv_len = 333, .causal = false});
  const double ends[] = {0.3, 0.5, 0.7, 0.9};
  for (const bool by_count : {false, true}) {
    const std::string rule = by_count ? "rule=topk" : "rule=threshold";
    const Result result = test::attend(
        *make_method("psa:block_q=32,block_k=16,pack=16,sample=1,end_1=0.3,end_2=0.5,end_4=0.7,end_8=0.9," + rule),
        input);
    for (std::int64_t tile = 0; tile < 7; ++tile) {
      const std::vector<double> scores = scores_of(input, tile, 32, 16);
      std::vector<std::size_t> order(scores.size());
      std::iota(order.begin(), order.end(), 0U);
      std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return scores[a] > scores[b]; });
      const double total = std::accumulate(scores.begin(), scores.end(), 0.0);
      std::vector<int> expected(scores.size(), -1);
      std::size_t start = 0;
      for (int level = 0; level < 4; ++level) {
        auto end = static_cast<std::size_t>(ends[level] * static_cast<double>(scores.size()));
        if (!by_count) {
          end = 0;
          double sum = 0;
          while (end < order.size() && sum + scores[order[end]] <= ends[level] * total) sum += scores[order[end++]];
          end = end == 0 ? 0 : std::min(end + 1, order.size());
          if (level == 0) end = std::max(end, static_cast<std::size_t>(0.06 * static_cast<double>(scores.size())) + 1);
        }
        // A block of 16 keys fills a pack of 16 at level 1 only: pooled by c, c blocks belong together.
        const auto unit = static_cast<std::size_t>(kMembers[level]);
        std::size_t length = end > start ? (end - start + unit - 1) / unit * unit : 0;
        if (start + length > order.size()) length = (order.size() - start) / unit * unit;
        for (std::size_t i = start; i < start + length; ++i) expected[order[i]] = level;
        start += length;
      }
      EXPECT_EQ(levels_of(result.plan, 0, tile), expected) << rule << ", tile " << tile;
    }
  }
}

TEST(Psa, SimilarityLimitsTheLevel) {
  const std::string spec = kSmall + "rule=topk,end_1=0,end_2=0,end_4=0,end_8=1,similarity=true";
  AttentionCase input({.name = "similar", .q_heads = 1, .q_len = 64, .kv_len = 64, .causal = false});
  // Blocks of 16: random keys, pairs alike, fours alike, all alike.
  for (std::int64_t j = 16; j < 64; ++j) {
    const std::int64_t group = j < 32 ? 2 : j < 48 ? 4 : 16;
    for (std::int64_t d = 0; d < 16; ++d) input.set_k(0, 0, j, d, input.k(0, 0, j / group * group, d));
  }
  const Result result = test::attend(*make_method(spec), input);
  EXPECT_EQ(levels_of(result.plan, 0, 0), (std::vector<int>{0, 1, 2, 3}));
}

TEST(Psa, TextIsReadRawAndSeesEverything) {
  const TokenGrid grid{{2, 8, 8}, 5, 20};
  const AttentionCase input = on_grid(grid, {.name = "grid", .causal = false});
  const Result result = test::attend(*make_method(kSmall + "rule=topk,end_1=0,end_2=0,end_4=0,end_8=0.3"), input);
  const auto mask = dense_mask(result.plan);
  const auto head = test::head_mask(result.plan, mask, 0, 1);
  for (std::int64_t n = 0; n < grid.tokens(); ++n) {
    for (std::int64_t j = 0; j < grid.tokens(); ++j) {
      const bool text = n < 5 || n >= 133 || j < 5 || j >= 133;
      ASSERT_TRUE(!text || head.at(n, j)) << n << ", " << j;
    }
  }
}

TEST(Psa, SamplesFollowSeedAndLayer) {
  const AttentionCase input({.name = "seed", .q_heads = 1, .q_len = 600, .kv_len = 600, .causal = false});
  const auto plan_of = [&](const std::string& seed, std::int64_t layer) {
    PlanContext context;
    context.layer = layer;
    return make_method(kMixed + ",seed=" + seed)->plan(input.problem, input.inputs, context);
  };
  EXPECT_TRUE(plan_of("1", 0) == plan_of("1", 0));
  EXPECT_FALSE(plan_of("1", 0) == plan_of("2", 0));
  EXPECT_FALSE(plan_of("1", 0) == plan_of("1", 1));
}

TEST(Psa, OrderFollowsTheGrid) {
  const TokenGrid grid{{4, 6, 8}, 2, 3};
  const AttentionCase input = on_grid(grid, {.name = "grid", .causal = false});
  const Plan plan = make_method(kMixed)->plan(input.problem, input.inputs, {});
  EXPECT_EQ(plan.key_order[0], score::with_text(grid, score::gilbert_order(grid.extent)));
  EXPECT_EQ(plan.query_order[0], plan.key_order[0]);
}

/// sum of output . d_o by the formula over the keys that a plan names, from q, k and v as float64 [heads][tokens][dim].
double loss_by_formula(const Problem& problem, const Plan& plan, const std::vector<double>& q,
                       const std::vector<double>& k, const std::vector<double>& v, const std::vector<float>& d_o) {
  double loss = 0;
  const std::int64_t dim = problem.head_dim;
  const std::int64_t value_dim = problem.value_dim;
  for (std::int64_t h = 0; h < problem.q_heads; ++h) {
    const std::int64_t kv = h / problem.group() * problem.kv_len;
    const std::int64_t block = plan.block_of(0, h);
    const bool ordered = !plan.query_order.empty() && !plan.query_order[block].empty();
    for (std::int64_t place = 0; place < problem.q_len; ++place) {
      const std::int64_t n = ordered ? plan.query_order[block][place] : place;
      std::vector<double> sums(static_cast<std::size_t>(value_dim));
      double total = 0;
      for (const test::PooledKey& key : test::keys_of_row(plan, 0, h, place / plan.tile_q, kMembers)) {
        const std::int64_t last = *std::max_element(key.members.begin(), key.members.end());
        if (problem.causal && last > problem.q_offset_of(0) + n) continue;
        double score = 0;
        for (const std::int64_t j : key.members) {
          for (std::int64_t d = 0; d < dim; ++d) {
            score += q[(h * problem.q_len + n) * dim + d] * k[(kv + j) * dim + d];
          }
        }
        const auto members = static_cast<double>(key.members.size());
        const double weight = members * std::exp(score / members * problem.softmax_scale());
        total += weight;
        for (const std::int64_t j : key.members) {
          for (std::int64_t d = 0; d < value_dim; ++d) sums[d] += weight / members * v[(kv + j) * value_dim + d];
        }
      }
      for (std::int64_t d = 0; d < value_dim && total > 0; ++d) {
        loss += sums[d] / total * d_o[(h * problem.q_len + n) * value_dim + d];
      }
    }
  }
  return loss;
}

TEST(Psa, GradientsMatchCentralDifferencesOfTheFormula) {
  for (const bool causal : {false, true}) {
    // Ragged: the last pooled entries have fewer members.
    const TokenGrid grid{{2, 5, 7}, 0, 3};
    const AttentionCase input = on_grid(grid, {.name = "grid", .q_heads = 4, .kv_heads = 2, .causal = causal});
    const Problem& problem = input.problem;
    const auto method =
        make_method("psa:block_q=16,block_k=8,pack=1,rule=topk,end_1=0.2,end_2=0.4,end_4=0.6,end_8=0.8");
    const Result result = test::attend(*method, input);
    std::set<int> seen;
    for (const int level : levels_of(result.plan, 0, 1)) seen.insert(level);
    EXPECT_GE(seen.size(), 4U);
    std::vector<float> d_o(result.o.size());
    for (std::size_t i = 0; i < d_o.size(); ++i) d_o[i] = std::sin(static_cast<float>(i) * 1.3F);
    const auto numbers = [](const TensorView& view) {
      std::vector<double> values;
      for (std::int64_t h = 0; h < view.heads(); ++h) {
        for (std::int64_t n = 0; n < view.tokens(); ++n) {
          for (std::int64_t d = 0; d < view.dim(); ++d) {
            values.push_back(load_as_float(view.row(0, h, n), view.dtype, d));
          }
        }
      }
      return values;
    };
    std::array<std::vector<double>, 3> x{numbers(input.inputs.q), numbers(input.inputs.k), numbers(input.inputs.v)};
    std::array<std::vector<float>, 3> actual;
    for (std::size_t i = 0; i < 3; ++i) actual[i].assign(x[i].size(), 99.0F);
    Gradients gradients;
    gradients.d_q = mutable_view_of(actual[0].data(), DType::f32, input.inputs.q.shape);
    gradients.d_k = mutable_view_of(actual[1].data(), DType::f32, input.inputs.k.shape);
    gradients.d_v = mutable_view_of(actual[2].data(), DType::f32, input.inputs.v.shape);
    const std::array<std::int64_t, 4> o_shape{1, problem.q_heads, problem.q_len, problem.value_dim};
    const SavedForward saved{
        view_of(result.o.data(), DType::f32, o_shape), result.lse, view_of(d_o.data(), DType::f32, o_shape), {}};
    method->backward(problem, input.inputs, saved, gradients, {}, &result.plan);
    const auto with_plan = actual;
    method->backward(problem, input.inputs, saved, gradients, {});  // plans again, the same
    EXPECT_EQ(actual, with_plan);
    const auto loss = [&] { return loss_by_formula(problem, result.plan, x[0], x[1], x[2], d_o); };
    for (std::size_t tensor = 0; tensor < 3; ++tensor) {
      for (std::size_t i = tensor; i < x[tensor].size(); i += x[tensor].size() / 23) {
        const double kept = x[tensor][i];
        x[tensor][i] = kept + 1e-5;
        const double above = loss();
        x[tensor][i] = kept - 1e-5;
        const double expected = (above - loss()) / 2e-5;
        x[tensor][i] = kept;
        ASSERT_NEAR(actual[tensor][i], expected, 2e-4 * (1 + std::abs(expected))) << tensor << ", " << i;
      }
    }
    // Only what is asked for, in the type that is asked for.
    std::vector<std::uint16_t> half(actual[1].size());
    Gradients keys;
    keys.d_k = mutable_view_of(half.data(), DType::bf16, input.inputs.k.shape);
    method->backward(problem, input.inputs, saved, keys, {});
    for (std::size_t i = 0; i < half.size(); ++i) EXPECT_EQ(half[i], float_to_bf16(actual[1][i])) << i;
  }
}

TEST(Psa, RefusesWhatItCannotRun) {
  for (const char* spec : {"psa:block_k=12", "psa:tile=2x", "psa:end_1=1.5", "psa:sample=0", "psa:rule=best"}) {
    EXPECT_THROW(make_method(spec), Error) << spec;
  }
  AttentionCase input({.name = "alibi", .q_len = 40, .kv_len = 40});
  const std::vector<float> slopes(2, 0.5F);
  input.inputs.modifiers.alibi_slopes = slopes;
  EXPECT_THROW(test::attend(*make_method("psa"), input), Error);
}

}  // namespace
}  // namespace tessera
