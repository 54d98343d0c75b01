// pisa: the Taylor expansion in float64, the selection, and how the error falls with the scale.
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "core/error.h"
#include "methods/diffusion/pooled_reference.h"

namespace tessera {
namespace {

using test::AttentionCase;
using test::CaseShape;
using test::Result;

AttentionCase bidirectional(CaseShape shape, const std::optional<TokenGrid>& grid = {}) {
  shape.causal = false;
  if (grid) shape.q_len = shape.kv_len = grid->tokens();
  AttentionCase input(shape);
  input.problem.grid = grid;
  return input;
}

/// sum over the members of (q . (k - mean)) v; scaled.
std::vector<double> first_order_of(const AttentionCase& input, std::int64_t s, std::int64_t h, std::int64_t n,
                                   std::span<const std::int64_t> members) {
  const std::int64_t kv_head = h / input.problem.group();
  const std::vector<double> mean = test::mean_of(input, s, kv_head, members, false);
  const double mean_score = test::score_of(input, s, h, n, mean);
  std::vector<double> sum(static_cast<std::size_t>(input.problem.value_dim));
  for (const std::int64_t j : members) {
    const std::int64_t one[] = {j};
    const double score = test::score_of(input, s, h, n, test::mean_of(input, s, kv_head, one, false));
    const std::vector<double> value = test::mean_of(input, s, kv_head, one, true);
    for (std::size_t d = 0; d < sum.size(); ++d) sum[d] += (score - mean_score) * value[d];
  }
  return sum;
}

/// The members of every tile of a sequence, in the order of the plan.
std::vector<std::vector<std::int64_t>> tiles_of(const Plan& plan, std::int64_t s, std::int64_t h) {
  const std::int64_t block = plan.block_of(s, h);
  const bool ordered = !plan.key_order.empty() && !plan.key_order[block].empty();
  std::vector<std::vector<std::int64_t>> tiles;
  for (std::int64_t place = 0; place < plan.problem.kv_len_of(s); ++place) {
    if (place % plan.tile_k == 0) tiles.emplace_back();
    tiles.back().push_back(ordered ? plan.key_order[block][place] : place);
  }
  return tiles;
}

void expect_formula(const AttentionCase& input, const Result& result, const std::string& correction, double tolerance,
                    std::int64_t every = 7) {
  const Problem& problem = input.problem;
  const Plan& plan = result.plan;
  for (std::int64_t s = 0; s < problem.batch; ++s) {
    for (std::int64_t h = 0; h < problem.q_heads; ++h) {
      const std::int64_t kv_head = h / problem.group();
      const std::int64_t block = plan.block_of(s, h);
      const bool ordered = !plan.query_order.empty() && !plan.query_order[block].empty();
      const auto tiles = tiles_of(plan, s, h);
      for (std::int64_t place = 0; place < problem.q_len_of(s); place += every) {
        const std::int64_t n = ordered ? plan.query_order[block][place] : place;
        std::vector<double> sum(static_cast<std::size_t>(problem.value_dim));
        double l = 0;
        double g = 0;
        const std::int64_t members_of[] = {1, plan.tile_k};
        for (const test::PooledKey& key : test::keys_of_row(plan, s, h, place / plan.tile_q, members_of)) {
          const auto count = static_cast<double>(key.members.size());
          const double w =
              std::exp(test::score_of(input, s, h, n, test::mean_of(input, s, kv_head, key.members, false)));
          const std::vector<double> value = test::mean_of(input, s, kv_head, key.members, true);
          l += count * w;
          if (key.source == 1) g += count * w;
          for (std::size_t d = 0; d < sum.size(); ++d) sum[d] += count * w * value[d];
          if (key.source != 1 || correction != "block") continue;
          const std::vector<double> term = first_order_of(input, s, h, n, key.members);
          for (std::size_t d = 0; d < sum.size(); ++d) sum[d] += w * term[d];
        }
        if (correction == "shared") {
          for (const auto& tile : tiles) {
            const std::vector<double> term = first_order_of(input, s, h, n, tile);
            for (std::size_t d = 0; d < sum.size(); ++d)
              sum[d] += g * term[d] / static_cast<double>(problem.kv_len_of(s));
          }
        }
        const std::int64_t row = test::output_row(problem, s, h, n);
        if (l == 0) continue;
        ASSERT_NEAR(result.lse[row], std::log(l), tolerance) << "head " << h << ", query " << n;
        for (std::size_t d = 0; d < sum.size(); ++d) {
          ASSERT_NEAR(result.o[row * problem.value_dim + static_cast<std::int64_t>(d)], sum[d] / l, tolerance)
              << "sequence " << s << ", head " << h << ", query " << n;
        }
      }
    }
  }
}

TEST(Pisa, IsTheExpansion) {
  for (const std::string correction : {"shared", "block", "none"}) {
    const auto method = make_method("pisa:block=16,density=0.3,correction=" + correction);
    SCOPED_TRACE(correction);
    for (const auto& grid : {TokenGrid{{1, 12, 10}, 0, 0}, TokenGrid{{2, 5, 9}, 3, 11}}) {
      const AttentionCase input = bidirectional({.name = "grid", .q_heads = 4, .kv_heads = 2}, grid);
      const Result result = test::attend(*method, input);
      EXPECT_EQ(result.plan.sources.size(), 2U);
      expect_formula(input, result, correction, 2e-4);
    }
  }
}

TEST(Pisa, IsTheExpansionForEveryKindOfInput) {
  const auto method = make_method("pisa:block=32,density=0.2");
  for (const CaseShape& shape : test::all_shapes()) {
    SCOPED_TRACE(shape.name);
    const AttentionCase input = bidirectional(shape);
    const Result result = test::attend(*method, input);
    const double tolerance = shape.dtype == DType::bf16 ? 6e-2 : shape.dtype == DType::f16 ? 8e-3 : 3e-4;
    expect_formula(input, result, "shared", tolerance, 29);
    EXPECT_EQ(result.o, test::attend(*method, input, KernelKind::automatic, 1).o);
  }
}

TEST(Pisa, SelectsByNearnessAndRemainder) {
  const AttentionCase input = bidirectional({.name = "select", .q_heads = 1, .q_len = 150, .kv_len = 333});
  for (const bool value_aware : {false, true}) {
    const Result result = test::attend(
        *make_method(std::string("pisa:block=16,density=0.3,value_aware=") + (value_aware ? "true" : "false")), input);
    const auto tiles = tiles_of(result.plan, 0, 0);
    for (std::int64_t tile = 0; tile < 10; ++tile) {
      std::vector<std::pair<double, std::size_t>> scores;
      for (std::size_t j = 0; j < tiles.size(); ++j) {
        const std::vector<double> mean = test::mean_of(input, 0, 0, tiles[j], false);
        double score = 0;
        const std::int64_t end = std::min<std::int64_t>(tile * 16 + 16, 150);
        for (std::int64_t n = tile * 16; n < end; ++n) {
          score += test::score_of(input, 0, 0, n, mean) / static_cast<double>(end - tile * 16);
        }
        if (value_aware) {
          double square = 0;
          for (std::int64_t d = 0; d < 16; ++d) {
            for (std::int64_t e = 0; e < 8; ++e) {
              double h = 0;
              for (const std::int64_t k : tiles[j]) {
                h += (input.k(0, 0, k, d) - mean[d]) * load_as_float(input.inputs.v.row(0, 0, k), DType::f32, e);
              }
              square += h * h;
            }
          }
          score += std::log(std::sqrt(square) + 1e-5);
        }
        scores.emplace_back(-score, j);
      }
      std::sort(scores.begin(), scores.end());
      std::vector<std::int64_t> expected;
      for (std::size_t i = 0; i < 6; ++i) {  // int(0.3 * 21)
        for (const std::int64_t k : tiles[scores[i].second]) expected.push_back(k);
      }
      std::sort(expected.begin(), expected.end());
      std::vector<std::int64_t> kept;
      const std::int64_t members_of[] = {1, 16};
      for (const test::PooledKey& key : test::keys_of_row(result.plan, 0, 0, tile, members_of)) {
        if (key.source == 0) kept.push_back(key.members[0]);
      }
      EXPECT_EQ(kept, expected) << "tile " << tile;
    }
  }
}

TEST(Pisa, NoKeyIsLeftOut) {
  const AttentionCase input = bidirectional({.name = "span", .q_heads = 1, .q_len = 100, .kv_len = 213});
  const Result result = test::attend(*make_method("pisa:block=16,density=0"), input);
  const std::int64_t members_of[] = {1, 16};
  std::vector<std::int64_t> seen;
  std::int64_t raw = 0;
  for (const test::PooledKey& key : test::keys_of_row(result.plan, 0, 0, 3, members_of)) {
    seen.insert(seen.end(), key.members.begin(), key.members.end());
    raw += key.source == 0 ? 1 : 0;
  }
  std::sort(seen.begin(), seen.end());
  std::vector<std::int64_t> all(213);
  std::iota(all.begin(), all.end(), 0);
  EXPECT_EQ(seen, all);
  EXPECT_LE(raw, 16);  // one tile at density 0
  EXPECT_GT(raw, 0);
}

TEST(Pisa, KeysConstantInsideTilesAreExact) {
  AttentionCase input = bidirectional({.name = "constant", .q_len = 80, .kv_len = 150});
  for (std::int64_t j = 0; j < 150; ++j) {
    for (std::int64_t d = 0; d < 16; ++d) input.set_k(0, 0, j, d, input.k(0, 0, j / 16 * 16, d));
  }
  const Result dense = test::attend(*make_method("dense"), input);
  for (const char* correction : {"shared", "block", "none"}) {
    const Result result =
        test::attend(*make_method(std::string("pisa:block=16,density=0.2,correction=") + correction), input);
    for (std::size_t i = 0; i < dense.o.size(); ++i) ASSERT_NEAR(result.o[i], dense.o[i], 1e-5) << correction;
    for (std::size_t i = 0; i < dense.lse.size(); ++i) ASSERT_NEAR(result.lse[i], dense.lse[i], 1e-5) << correction;
  }
}

TEST(Pisa, ErrorFallsWithTheOrderOfTheExpansion) {
  AttentionCase input = bidirectional({.name = "scale", .q_len = 96, .kv_len = 192});
  const auto error = [&](const std::string& correction, float scale) {
    input.problem.scale = scale;
    const Result dense = test::attend(*make_method("dense"), input, KernelKind::reference);
    const Result result =
        test::attend(*make_method("pisa:block=16,density=0.25,correction=" + correction), input, KernelKind::reference);
    double square = 0;
    for (std::size_t i = 0; i < dense.o.size(); ++i) square += std::pow(result.o[i] - dense.o[i], 2);
    return std::sqrt(square);
  };
  constexpr float scale = 0.02F;
  EXPECT_NEAR(error("block", scale) / error("block", scale / 2), 4, 0.5);
  EXPECT_NEAR(error("none", scale) / error("none", scale / 2), 2, 0.2);
  EXPECT_NEAR(error("shared", scale) / error("shared", scale / 2), 2, 0.2);
  EXPECT_LT(error("shared", scale), error("none", scale));
  EXPECT_LT(error("block", scale / 2), 0.2 * error("shared", scale / 2));
}

TEST(Pisa, WholeDensityIsDenseAttention) {
  const AttentionCase input = bidirectional({.name = "dense"}, TokenGrid{{1, 9, 13}, 2, 0});
  const Result dense = test::attend(*make_method("dense"), input);
  const Result result = test::attend(*make_method("pisa:density=1,block=16"), input);
  for (std::size_t i = 0; i < dense.o.size(); ++i) ASSERT_NEAR(result.o[i], dense.o[i], 1e-5);
  for (std::size_t i = 0; i < dense.lse.size(); ++i) ASSERT_NEAR(result.lse[i], dense.lse[i], 1e-5);
}

TEST(Pisa, RefusesCausalityAndModifiers) {
  AttentionCase input = bidirectional({.name = "modifiers", .q_len = 40, .kv_len = 40});
  const auto method = make_method("pisa");
  EXPECT_NO_THROW(test::attend(*method, input));
  input.inputs.modifiers.softcap = 10;
  EXPECT_THROW(test::attend(*method, input), Error);
  EXPECT_THROW(test::attend(*method, AttentionCase({.name = "causal", .q_len = 40, .kv_len = 40})), Error);
  EXPECT_THROW(make_method("pisa:tile=0"), Error);
  EXPECT_THROW(make_method("pisa:density=2"), Error);
}

}  // namespace
}  // namespace tessera
